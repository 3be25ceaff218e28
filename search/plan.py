"""Which trials a search has: controls, suggestions, and what of these is repeated with fresh seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ..distill.seeding import derived_seed
from .events import Arm, Confirming, Extended, History, TrialHistory
from .study import Study

# Seeds are shown to people, and torch takes no larger ones everywhere.
SEEDS = 2**31


@dataclass(frozen=True)
class Repeat:
    """A configuration that is trained again.

    Attributes:
        confirms: number of the trial that had it first.
        data_seed: of order and augmentation.
        init_seed: of the initial weights.
    """

    confirms: int
    data_seed: int
    init_seed: int


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to run.

    Attributes:
        number: of the trial, from 1.
        arm: search, control or confirm.
        control: name of the control arm, or empty.
        repeat: what a confirm trial repeats; None for others.
    """

    number: int
    arm: Arm
    control: str = ""
    repeat: Repeat | None = None


def plan_trials(study: Study, additions: Sequence[Extended | Confirming] = ()) -> list[PlannedTrial]:
    """All trials in the order of their numbers: controls first, dealt out evenly, then the search's, then additions.

    Args:
        study: its controls and budget are used.
        additions: what was added to them, in order.
    """
    arms = study.controls.arms
    kinds: list[tuple[Arm, str, Repeat | None]] = [
        ("control", arms[i % len(arms)], None) for i in range(study.control_trials)
    ]
    kinds += [("search", "", None)] * study.budget.trials
    for addition in additions:
        if isinstance(addition, Extended):
            kinds += [("search", "", None)] * addition.trials
        else:
            kinds += [("confirm", "", Repeat(**repeat)) for repeat in addition.repeats]
    return [PlannedTrial(number, *kind) for number, kind in enumerate(kinds, start=1)]


class Plan:
    """The trials of a search as its history stands; the history may grow.

    Args:
        study: what is searched.
        history: of the search.
    """

    def __init__(self, study: Study, history: History) -> None:
        self._study, self._history = study, history

    @property
    def trials(self) -> list[PlannedTrial]:
        """All that are planned so far."""
        return plan_trials(self._study, self._history.additions)

    @property
    def remaining(self) -> list[PlannedTrial]:
        """Those without an outcome."""
        return remaining_trials(self.trials, self._history)

    @property
    def over(self) -> bool:
        """Whether nothing is left to run."""
        return not self.remaining and not self.repeats_due()

    @property
    def most(self) -> int:
        """How many trials there will be at most."""
        if not self._undecided():
            return len(self.trials) + len(self.repeats_due())
        # Which controls are the best does not change any more once one is repeated; which configurations are may.
        settled = sum(self._history.trials[repeat.confirms].suggested.arm == "control" for repeat in self._repeats())
        return len(self.trials) + most_repeats(self._study) - settled

    def repeats_due(self) -> list[Repeat]:
        """What is to be repeated now, and is not planned yet.

        The best controls as soon as all controls are over, while search trials may still run: actors that have nothing
        else to do are not to stand idle. The search's best when all search trials are over.
        """
        undecided = self._undecided()
        if self._study.confirm.seeds == 0 or "control" in undecided:
            return []
        known = set(self._repeats())
        sources = confirmed_trials(self._study, self._history)
        if "search" in undecided:
            sources = [number for number in sources if self._history.trials[number].suggested.arm == "control"]
        # Seed by seed, so that what is there after an interruption is paired.
        wanted = [Repeat(source, *seeds) for seeds in confirm_seeds(self._study) for source in sources]
        return [repeat for repeat in wanted if repeat not in known]

    def _undecided(self) -> set[Arm]:
        """Arms of which a trial has no outcome, and which decide what is confirmed."""
        return {planned.arm for planned in self.remaining if planned.arm != "confirm"}

    def _repeats(self) -> list[Repeat]:
        """All that are planned."""
        return [planned.repeat for planned in self.trials if planned.repeat]

    def confirming(self) -> Confirming:
        """The event that plans what is due."""
        return Confirming([asdict(repeat) for repeat in self.repeats_due()])


def remaining_trials(plan: Sequence[PlannedTrial], history: History) -> list[PlannedTrial]:
    """Those of the plan without an outcome."""
    return [p for p in plan if p.number not in history.trials or history.trials[p.number].finished is None]


def most_repeats(study: Study) -> int:
    """Confirm trials, if there are as many completed configurations and control arms as are to be confirmed."""
    confirm = study.confirm
    arms = len(set(study.controls.arms[: study.control_trials]))
    return (min(confirm.configurations, study.budget.trials) + min(confirm.controls, arms)) * confirm.seeds


def confirm_seeds(study: Study) -> list[tuple[int, int]]:
    """(data seed, init seed) of each repeat, the same for all that is confirmed; none is the search's own."""
    return [
        (
            derived_seed("confirm data", study.seed, repeat) % SEEDS,
            derived_seed("confirm init", study.seed, repeat) % SEEDS,
        )
        for repeat in range(1, study.confirm.seeds + 1)
    ]


def confirmed_trials(study: Study, history: History) -> list[int]:
    """Numbers of the trials whose configurations are confirmed: the search's best, then the best of the best controls.

    By the objective after the last rung, with the search's own seeds: no repeat takes part in the choice. Without a
    completed search trial there is nothing to confirm.
    """
    best = [trial.number for trial in _best_first(study, history, "search")][: study.confirm.configurations]
    controls: dict[str, int] = {}
    for trial in _best_first(study, history, "control"):
        controls.setdefault(trial.suggested.control, trial.number)
    return [*best, *list(controls.values())[: study.confirm.controls]] if best else []


def _best_first(study: Study, history: History, arm: Arm) -> Iterator[TrialHistory]:
    sign = -1.0 if study.objective.direction == "maximize" else 1.0
    valued = [
        (sign * value, trial.number)
        for trial in history.trials.values()
        if trial.suggested.arm == arm and trial.finished is not None and trial.finished.outcome == "completed"
        if (value := trial.latest(study.objective.metric)) is not None
    ]
    return (history.trials[number] for _, number in sorted(valued))
