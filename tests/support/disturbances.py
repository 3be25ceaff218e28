"""A search as processes, in a folder of its own, that is interrupted in any way and goes on."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from processes import TINY_STUDY, CommandLine, Ended, Family, ended, journal_events
from ray_cluster import RayCluster

# More epochs than the tiny study's trials have, so that a signal finds them in the middle, but each of them shorter.
SMALL_STUDY: dict[str, Any] = {
    **TINY_STUDY,
    "recipe": {**TINY_STUDY["recipe"], "batch_size": 64},
    # The last three suggestions are TPE's own: they depend on the whole history.
    "budget": {"trials": 5, "startup_trials": 2, "rungs": [3, 9], "reduction": 1.5, "checkpoint_seconds": 0},
}
CONTROLS = len(TINY_STUDY["controls"]["arms"])
PLANNED = CONTROLS + SMALL_STUDY["budget"]["trials"]
NUMBERS = list(range(1, PLANNED + 1))
RUNGS = SMALL_STUDY["budget"]["rungs"]
# What no command may take: one that does hangs.
HANGS_S = 300

Event = dict[str, Any]


@dataclass(frozen=True)
class Undisturbed:
    """What every disturbed search must come to.

    Attributes:
        results: its folder.
        events: its journal.
        ended: how it ended, with its trials.
    """

    results: Path
    events: list[Event]
    ended: Ended


@dataclass(frozen=True)
class Leg:
    """A part of a search from a start to its end, whatever ended it.

    Attributes:
        ended: how the process ended.
        before: the journal when it was disturbed.
        after: the journal when the process had ended.
        seconds: from the disturbance to the end of the process.
    """

    ended: Ended
    before: list[Event]
    after: list[Event]
    seconds: float


class DisturbedSearch:
    """A search as it is launched from a folder, with a study file of its name.

    Args:
        folder: where results and tracking store go.
        cache: with the teacher and its layers.
        name: of the search.
        study: what to search.
        options: of the command line, at every start.
        cluster: where it runs; None: on a Ray of its own.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        name: str,
        study: dict[str, Any] | None = None,
        options: Sequence[str] = (),
        cluster: RayCluster | None = None,
    ) -> None:
        self.folder, self.name, self.study_file = folder, name, f"{name}.yaml"
        if not (folder / self.study_file).exists():
            (folder / self.study_file).write_text(yaml.safe_dump(study or SMALL_STUDY, sort_keys=False))
        self.results = folder / "results" / name
        self._journal = str(self.results / "journal.jsonl")
        self.command_line = CommandLine(cache, console_script=True, environment=cluster and cluster.environment)
        self._options = [*options, *(["--address", cluster.address] if cluster else [])]

    @property
    def store(self) -> str:
        """The sqlite store that it makes unless another is named."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def arguments(self, *more: str) -> list[str]:
        """What is typed to start or to resume it."""
        return ["search", self.study_file, "--name", self.name, "--json", *self._options, *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Starts it, or with `--resume` goes on."""
        return self.command_line.start(self.arguments(*more), self.folder)

    def finish(self, *more: str) -> Ended:
        """Starts it, or goes on, and lets it come to its end."""
        return ended(self.start(*more), HANGS_S)

    def events(self, kind: str | None = None) -> list[Event]:
        """What is journaled so far."""
        return journal_events(self.results, kind)

    def _journal_size(self) -> int:
        try:
            return os.stat(self._journal).st_size
        except FileNotFoundError:
            return 0

    def trial_processes(self) -> list[int]:
        """The processes that train, at present."""
        return trial_processes(self.command_line)

    def wait(self, process: subprocess.Popen[str], condition: Callable[[list[Event]], bool]) -> list[Event]:
        """The journal as soon as it meets the condition: it is looked at a hundred times a second.

        Raises:
            AssertionError: the process ended before that.
        """
        deadline, read = time.monotonic() + HANGS_S, -1
        while True:
            over = process.poll() is not None
            # Before the events: what comes between the two is read the next time.
            if (size := self._journal_size()) != read:
                read, events = size, self.events()
                if condition(events):
                    return events
            if over or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"what was waited for never came; the end was {ended(process)}")
            time.sleep(0.01)

    def disturb(self, condition: Callable[[list[Event]], bool], action: Callable[[Any], None], *more: str) -> Leg:
        """Starts it, or goes on, and acts on the process as soon as the journal meets the condition."""
        process = self.start(*more)
        before = self.wait(process, condition)
        acted = time.monotonic()
        action(process)
        how = ended(process, HANGS_S)
        return Leg(how, before, self.events(), time.monotonic() - acted)


def trial_processes(family: Family) -> list[int]:
    """Those processes of a family that train: Tune's actors by the name that Ray gives them."""
    return [process for process, command in family.commands().items() if command.startswith("ray::ImplicitFunc")]


def suggested(number: int) -> Callable[[list[Event]], bool]:
    """Whether a trial has been suggested."""
    return lambda events: any(e["event"] == "suggestion" and e["number"] == number for e in events)


def reported(number: int, epoch: int) -> Callable[[list[Event]], bool]:
    """Whether a trial has reported an epoch."""
    return lambda events: any(e["event"] == "report" and (e["number"], e["epoch"]) == (number, epoch) for e in events)


def finished(number: int) -> Callable[[list[Event]], bool]:
    """Whether a trial has an outcome."""
    return lambda events: any(e["event"] == "outcome" and e["number"] == number for e in events)


def retried(number: int, attempt: int) -> Callable[[list[Event]], bool]:
    """Whether a trial is begun again after so many attempts."""
    return lambda events: any(
        e["event"] == "retry" and (e["number"], e["attempt"]) == (number, attempt) for e in events
    )
