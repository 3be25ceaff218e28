"""The live table of a running search: a listener that draws."""

import time
from types import TracebackType
from typing import Self

from rich.live import Live
from rich.table import Table

from .events import Confirming, Event, Finished, History, Reported, Retried, Suggested, TrialHistory
from .mlflow_logger import parameters_for_mlflow
from .plan import Plan, Repeat
from .study import Study
from .view import View, loss_cell, trial_cells

ROWS = 12
# Metrics of a trial that has run out of device memory: of its steps, and of passes without gradients.
ACCUMULATION = "accumulation_steps"
HALVED = {ACCUMULATION, "halved_passes"}


class LiveTable:
    """Shows the trials as they go; where there is no terminal, one line a finished trial.

    Args:
        view: where to show it.
        history: of the search.
        study: its objective and budget are shown.
    """

    def __init__(self, view: View, history: History, study: Study) -> None:
        self._view, self._history, self._study = view, history, study
        self._planned = Plan(study, history).most
        self._started, self._halved = time.monotonic(), set[int]()
        self._live = Live(console=view.console, refresh_per_second=2, transient=True, get_renderable=self._table)

    def __enter__(self) -> Self:
        if self._view.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view.console.is_terminal:
            self._live.stop()

    def on_event(self, event: Event) -> None:
        """Says what goes wrong, what comes next, and, where nothing is drawn, how a trial ended."""
        match event:
            case Retried():
                self._view.say(
                    f"Trial {event.number} failed ({event.error}); it goes on from its last checkpoint, retry "
                    f"{event.attempt} of {self._study.budget.retries}."
                )
            case Confirming():
                self._planned = Plan(self._study, self._history).most
                self._view.say(self._confirmed(event))
            case Reported() if event.number not in self._halved and HALVED & event.metrics.keys():
                self._halved.add(event.number)
                what = "batches are" if ACCUMULATION in event.metrics else "passes without gradients are"
                self._view.say(
                    f"Trial {event.number} ran out of device memory in epoch {event.epoch}: its {what} computed in "
                    "halves from now on."
                )
            case Finished():
                self._end(event)
            case _:
                pass

    def _confirmed(self, event: Confirming) -> str:
        repeats = [Repeat(**repeat) for repeat in event.repeats]
        sources = list(dict.fromkeys(repeat.confirms for repeat in repeats))
        named = [f"{number} ({_name(self._history.trials[number].suggested)})" for number in sources]
        return f"Confirming trials {', '.join(named)}: {len(repeats)} trainings with fresh seeds."

    def _end(self, event: Finished) -> None:
        if not self._view.console.is_terminal:
            trial = self._history.trials[event.number]
            ended = sum(self._history.outcomes().values())
            said = f"[{ended}/{self._planned}] trial {event.number} ({_name(trial.suggested)}) {event.outcome}"
            reason = f": {event.error}" if event.error else ""
            self._view.say(f"{said}{self._value(trial)}{reason}")

    def _value(self, trial: TrialHistory) -> str:
        metric, last = self._study.objective.metric, trial.last
        known = trial.latest(metric)
        if last is None:
            return ""
        return f" at epoch {last.epoch}" if known is None else f" with {metric} {known:.4f} at epoch {last.epoch}"

    def _table(self) -> Table:
        counts = self._history.outcomes()
        ended = sum(counts.values())
        seconds = time.monotonic() - self._started
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        table = Table(title=f"{ended} of {self._planned} trials in {seconds:.0f} s   {said}")
        for column in ("trial", "arm", "hint points from", "K", "hint points", "loss", "β", "α", "τ", "epoch"):
            table.add_column(column)
        table.add_column(self._study.objective.metric)
        table.add_column("state")
        trials = sorted(self._history.trials.values(), key=lambda t: (t.finished is None, t.number))
        for trial in trials[-ROWS:]:
            table.add_row(*self._row(trial))
        return table

    def _row(self, trial: TrialHistory) -> tuple[str, ...]:
        suggested, last = trial.suggested, trial.last
        metric = self._study.objective.metric
        cells = trial_cells(suggested.arm, suggested.control, parameters_for_mlflow(suggested))
        epoch = f"{last.epoch if last else 0}/{self._study.budget.rungs[-1]}"
        known = trial.latest(metric)
        value = "" if known is None else f"{known:.4f}"
        return str(trial.number), *cells, epoch, value, trial.finished.outcome if trial.finished else "running"


def _name(suggested: Suggested) -> str:
    said = suggested.control or f"search, {loss_cell(suggested.parameters)}"
    return f"confirms {suggested.confirms}, {said}" if suggested.confirms else said
