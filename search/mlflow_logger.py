"""Follows a search's events into MLflow, from a thread of its own: a slow or dead server never holds up a search."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mlflow.exceptions import MlflowException

from .events import Event, Finished, Reported, Retried, Suggested, Tracked, TrialHistory
from .journal import SearchLog
from .tracking import TrackedSearch

HINT_FILE = "hint_configuration.json"
TRACEBACK_FILE = "traceback.txt"
STATUS = {"completed": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
LONGEST_PAUSE_S = 30.0
# Logged with every epoch, so it tells which ones a run has.
EPOCH = "epoch"

Write = Callable[[], object]


class MlflowLogger:
    """Writes trials to MLflow in the order of their events, and tries again while the store does not answer.

    Args:
        tracked: the search's runs.
        log: the search's log; run ids are journaled there.
    """

    def __init__(self, tracked: TrackedSearch, log: SearchLog) -> None:
        self._tracked, self._log = tracked, log
        self._queue: queue.Queue[Write | None] = queue.Queue()
        self._stopping = threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-logger", daemon=True)
        self._thread.start()

    def on_event(self, event: Event) -> None:
        """Queues what a live event means for MLflow."""
        milliseconds = round(time.time() * 1000)
        match event:
            case Suggested():
                self._queue.put(partial(self._open, event.number))
            case Reported():
                self._queue.put(partial(self._report, event, milliseconds))
            case Retried():
                self._queue.put(partial(self._retry, event))
            case Finished():
                self._queue.put(partial(self._finish, event))
            case _:
                pass

    def catch_up(self) -> None:
        """Queues all of the replayed history that the store does not have yet; call once, after a replay."""
        for number in sorted(self._log.history.trials):
            trial = self._log.history.trials[number]
            # A copy: reports that come in before the writer gets here have writes of their own.
            snapshot = replace(trial, reports=dict(trial.reports))
            self._queue.put(partial(self._replay, snapshot))

    def close(self, interrupted: bool, seconds: float | None = None) -> int:
        """Waits for the writing to end, closes what is open, and stops; raises what ended the writer's thread.

        Args:
            interrupted: whether open trials were interrupted: their runs are closed as KILLED.
            seconds: how long a store may take nothing before it is given up; None: 60, or 5 after an interrupt, for
                who interrupts does not want to wait.

        Returns:
            How many writes are missing in the store; a resume sends them.
        """
        if interrupted:
            for trial in self._log.history.unfinished():
                self._queue.put(partial(self._interrupt, trial))
        self._queue.put(None)
        if seconds is None:
            seconds = 5.0 if interrupted else 60.0
        # A slow store gets all the time it needs; one that takes nothing for so long is given up.
        left = -1
        while self._thread.is_alive() and self._queue.qsize() != left:
            left = self._queue.qsize()
            self._thread.join(seconds)
        self._stopping.set()
        self._thread.join(5)
        if self._broken is not None:
            raise self._broken
        in_flight = self._thread.is_alive()
        return sum(write is not None for write in self._queue.queue) + in_flight

    def _work(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                self._write_until_done(write)
            except BaseException as error:
                # Raised again by close(), on the driver's thread.
                self._broken = error
                return
            if self._stopping.is_set():
                return

    def _write_until_done(self, write: Write) -> None:
        pause = 0.5
        while True:
            try:
                write()
            except (MlflowException, OSError):
                # The journal has it all: if the store stays away, a resume sends what is missing.
                if self._stopping.wait(pause):
                    self._queue.put(write)
                    return
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                return

    def _open(self, number: int) -> str:
        trial = self._log.history.trials[number]
        if trial.run_id:
            return trial.run_id
        run_id = self._tracked.find_trial(number) or self._tracked.create_trial(number, self._tags(trial))
        # Also to a run that was found: the store, or we, may have died right after it was made.
        self._tracked.log_params(run_id, parameters_for_mlflow(trial.suggested))
        self._tracked.log_document(run_id, HINT_FILE, hint_document(trial.suggested))
        self._log.record(Tracked(number, run_id))
        return run_id

    def _tags(self, trial: TrialHistory) -> dict[str, str]:
        prepared = self._log.history.prepared
        tags = {"arm": trial.suggested.arm, "teacher.sha256": prepared.teacher_sha256 if prepared else ""}
        began = self._log.history.began
        if began is not None and began.study.get("dynamic_weights"):
            # With fewer than two terms there is nothing to share weight among.
            tags["hint_weights"] = "dynamic" if trial.suggested.hints.get("dynamic_weights") else "fixed"
        if trial.suggested.confirms:
            tags["confirms"] = str(trial.suggested.confirms)
        return tags | ({"control": trial.suggested.control} if trial.suggested.control else {})

    def _report(self, event: Reported, milliseconds: int) -> None:
        metrics = {**event.metrics, EPOCH: float(event.epoch)}
        self._tracked.log_metrics(self._open(event.number), event.epoch, metrics, milliseconds)

    def _retry(self, event: Retried) -> None:
        # `error` is of trials that failed for good.
        self._tracked.tag(self._open(event.number), {"retries": str(event.attempt), "retry.error": event.error})

    def _finish(self, event: Finished) -> None:
        run_id = self._open(event.number)
        if event.traceback:
            self._tracked.log_text(run_id, TRACEBACK_FILE, event.traceback)
        tags = {"outcome": event.outcome} | ({"error": event.error} if event.error else {})
        self._tracked.close(run_id, STATUS[event.outcome], tags)

    def _interrupt(self, trial: TrialHistory) -> None:
        self._tracked.close(self._open(trial.number), "KILLED", {"outcome": "interrupted"})

    def _replay(self, trial: TrialHistory) -> None:
        run_id = self._open(trial.number)
        if self._tracked.is_closed(run_id):
            return
        if trial.retries:
            self._tracked.tag(run_id, {"retries": str(trial.retries)})
        there = self._tracked.logged_epochs(run_id, EPOCH)
        milliseconds = round(time.time() * 1000)
        for epoch in sorted(set(trial.reports) - there):
            self._report(trial.reports[epoch], milliseconds)
        if trial.finished is not None:
            self._finish(trial.finished)
        else:
            self._tracked.set_running(run_id)


def parameters_for_mlflow(suggested: Suggested) -> dict[str, Any]:
    """A trial's parameters as the runs show them, the hint points included."""
    selection, hints = suggested.selection, suggested.hints
    shown = {name: value for name, value in suggested.parameters.items() if value != ""}
    shown |= {"data_seed": suggested.data_seed, "init_seed": suggested.init_seed}
    if selection:
        shown["hints.points"] = ",".join(selection["points"])
        # What `auto` came to.
        shown["hints.clusters"] = len(selection["points"])
        shown |= {
            f"hints.{quality}": f"{selection[quality]:.4f}"
            for quality in ("silhouette", "stability")
            if selection.get(quality) is not None
        }
        layers = dict.fromkeys(f"{p['teacher_layer']}→{p['student_layer']}" for p in hints["pairs"])
        shown["hints.pairs"] = ",".join(layers)
    elif suggested.control:
        shown["hints.selector"] = suggested.control
    return shown


def hint_document(suggested: Suggested) -> dict[str, Any]:
    """What an export needs of a trial, as an artifact of its run."""
    return {
        "hints": suggested.hints,
        "selection": suggested.selection,
        "parameters": suggested.parameters,
        "seeds": {"data_seed": suggested.data_seed, "init_seed": suggested.init_seed},
    }
