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
