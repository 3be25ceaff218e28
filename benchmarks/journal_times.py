"""When the events of a search happened, as its journal has it."""

import json
from dataclasses import dataclass
from pathlib import Path

from hintsearch.search.events import Finished, History, Reported, Suggested, event_from_dict


@dataclass(frozen=True)
class JournalTimes:
    """A search's history, with seconds since 1970.

    Attributes:
        history: at the end.
        begun: when each trial was suggested.
        reports: of each trial, when each epoch was reported.
        ended: when each trial had its outcome.
    """

    history: History
    begun: dict[int, float]
    reports: dict[int, dict[int, float]]
    ended: dict[int, float]

    def together(self, number: int) -> list[list[int]]:
        """A trial's epochs in order, those in one list that were reported at once.

        An epoch came with the one before it if it is journaled sooner after that than it could be trained.
        """
        found: list[list[int]] = []
        for epoch, time in sorted(self.reports.get(number, {}).items()):
            gap = time - self.reports[number].get(epoch - 1, 0.0)
            if gap < self.training_seconds(number, epoch) / 2:
                found[-1].append(epoch)
            else:
                found.append([epoch])
        return found

    def training_seconds(self, number: int, epoch: int) -> float:
        """Of an epoch, without validation."""
        reports = self.history.trials[number].reports
        before = reports[epoch - 1].metrics["training_seconds"] if epoch - 1 in reports else 0.0
        return reports[epoch].metrics["training_seconds"] - before

    def rungs(self, number: int) -> int:
        """How many rungs' ends a trial has reported, the last one's included."""
        trial = self.history.trials[number]
        completed = trial.finished is not None and trial.finished.outcome == "completed"
        return completed + sum(report.decision is not None for report in trial.reports.values())

    @property
    def end(self) -> float:
        """When the last trial ended."""
        return max(self.ended.values())

    def actors_up(self, actors: int) -> float:
        """When each of so many actors had reported for the first time."""
        first = sorted(self.begun)[:actors]
        return max(min(self.reports[number].values()) for number in first)


def read_times(journal: Path) -> JournalTimes:
    """Reads the journal of a search that was not resumed."""
    times = JournalTimes(History(), {}, {}, {})
    for line in journal.read_text().splitlines():
        content = json.loads(line)
        event, time = event_from_dict(content), float(content["time"])
        times.history.apply(event)
        match event:
            case Suggested():
                times.begun[event.number] = time
            case Reported():
                times.reports.setdefault(event.number, {})[event.epoch] = time
            case Finished():
                times.ended[event.number] = time
            case _:
                pass
    return times
