"""Follows a search's events into MLflow, from a thread of its own: a slow or dead server never holds up a search."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlflow.exceptions import MlflowException

from .events import Event, Finished, Reported, Retried, Suggested, Tracked, TrialHistory
from .journal import SearchLog
from .tracking import EpochMetrics, TrackedSearch

HINT_FILE = "hint_configuration.json"
TRACEBACK_FILE = "traceback.txt"
STATUS = {"completed": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
LONGEST_PAUSE_S = 30.0
# Epochs that a trial reports within this time go out in one request: a small student trains several a second, and each
# request costs the driver, and a server, as much as one with many of them.
GATHER_SECONDS = 1.0
# Logged with every epoch, so it tells which ones a run has.
EPOCH = "epoch"


@dataclass(frozen=True)
class _Write:
    """Something about a trial for the store."""

    number: int
    write: Callable[[], object]


@dataclass(frozen=True)
class _Report:
    """A report for the store, and when it came, in milliseconds since 1970."""

    event: Reported
    milliseconds: int

    @property
    def number(self) -> int:
        return self.event.number


class MlflowLogger:
    """Writes trials to MLflow in the order of their events, and tries again while the store does not answer.

    Args:
        tracked: the search's runs.
        log: the search's log; run ids are journaled there.
    """

    def __init__(self, tracked: TrackedSearch, log: SearchLog) -> None:
        self._tracked, self._log = tracked, log
        self._queue: queue.Queue[_Write | _Report | None] = queue.Queue()
        # Trials that were begun in this launch and have no run in the store for sure.
        self._begun = set[int]()
        # What the store has not taken yet.
        self._missing, self._counting = 0, threading.Lock()
        self._closing, self._stopping = threading.Event(), threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-logger", daemon=True)
        self._thread.start()

    def on_event(self, event: Event) -> None:
        """Queues what a live event means for MLflow."""
        match event:
            case Suggested():
                self._begun.add(event.number)
                self._put(_Write(event.number, partial(self._open, event.number)))
            case Reported():
                self._put(_Report(event, round(time.time() * 1000)))
            case Retried():
                self._put(_Write(event.number, partial(self._retry, event)))
            case Finished():
                self._put(_Write(event.number, partial(self._finish, event)))
            case _:
                pass

    def catch_up(self) -> None:
        """Queues all of the replayed history that the store does not have yet; call once, after a replay."""
        for number in sorted(self._log.history.trials):
            trial = self._log.history.trials[number]
            # A copy: reports that come in before the writer gets here have writes of their own.
            snapshot = replace(trial, reports=dict(trial.reports))
            self._put(_Write(number, partial(self._replay, snapshot)))

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
                self._put(_Write(trial.number, partial(self._interrupt, trial)))
        self._queue.put(None)
        self._closing.set()
        if seconds is None:
            seconds = 5.0 if interrupted else 60.0
        # A slow store gets all the time it needs; one that takes nothing for so long is given up.
        left = -1
        while self._thread.is_alive() and self._missing != left:
            left = self._missing
            self._thread.join(seconds)
        self._stopping.set()
        self._thread.join(5)
        if self._broken is not None:
            raise self._broken
        return self._missing

    def _put(self, item: _Write | _Report) -> None:
        self._count(1)
        self._queue.put(item)

    def _count(self, more: int) -> None:
        with self._counting:
            self._missing += more

    def _work(self) -> None:
        try:
            for items in self._gathered():
                for writes, write in self._requests(items):
                    if not self._write_until_done(write):
                        return
                    self._count(-writes)
        except BaseException as error:
            # Raised again by close(), on the driver's thread.
            self._broken = error

    def _gathered(self) -> Iterator[list[_Write | _Report]]:
        """What has come in, until the logger is closed; an item waits a moment for others."""
        while (item := self._queue.get()) is not None:
            self._closing.wait(GATHER_SECONDS)
            items = [item]
            for _ in range(self._queue.qsize()):
                more = self._queue.get()
                if more is None:
                    # Comes last.
                    self._queue.put(None)
                    break
                items.append(more)
            yield items

    def _requests(self, items: Iterable[_Write | _Report]) -> Iterator[tuple[int, Callable[[], object]]]:
        """Writes, and how many items each stands for: a trial's epochs are one, and its items keep their order."""
        requests: list[list[_Report] | _Write] = []
        growing: dict[int, list[_Report]] = {}
        for item in items:
            if isinstance(item, _Write):
                growing.pop(item.number, None)
                requests.append(item)
            elif item.number in growing:
                growing[item.number].append(item)
            else:
                growing[item.number] = [item]
                requests.append(growing[item.number])
        for request in requests:
            if isinstance(request, _Write):
                yield 1, request.write
            else:
                yield len(request), partial(self._report, request)

    def _write_until_done(self, write: Callable[[], object]) -> bool:
        """Whether the store took it; it is not waited for any longer once the logger is to stop."""
        pause = 0.5
        while not self._stopping.is_set():
            try:
                write()
            except (MlflowException, OSError):
                # The journal has it all: if the store stays away, a resume sends what is missing.
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                return True
        return False

    def _open(self, number: int) -> str:
        trial = self._log.history.trials[number]
        if trial.run_id:
            return trial.run_id
        known = None if number in self._begun else self._tracked.find_trial(number)
        # A request that failed may have been done all the same.
        self._begun.discard(number)
        run_id = known or self._tracked.create_trial(number, self._tags(trial))
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

    def _report(self, reports: Sequence[_Report]) -> None:
        """Of one trial."""
        figures = [
            EpochMetrics(event.epoch, {**event.metrics, EPOCH: float(event.epoch)}, milliseconds)
            for event, milliseconds in ((report.event, report.milliseconds) for report in reports)
        ]
        if reports:
            self._tracked.log_epochs(self._open(reports[0].number), figures)

    def _retry(self, event: Retried) -> None:
        self._tracked.tag(self._open(event.number), _retry_tags(event))

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
        if trial.retried is not None:
            self._tracked.tag(run_id, _retry_tags(trial.retried))
        there = self._tracked.logged_epochs(run_id, EPOCH)
        milliseconds = round(time.time() * 1000)
        self._report([_Report(trial.reports[epoch], milliseconds) for epoch in sorted(set(trial.reports) - there)])
        if trial.finished is not None:
            self._finish(trial.finished)
        else:
            self._tracked.set_running(run_id)


def _retry_tags(event: Retried) -> dict[str, str]:
    # `error` is of trials that failed for good.
    return {"retries": str(event.attempt), "retry.error": event.error}


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
