"""What happens in a search, as events; and the history that they add up to.

Everything that a search knows follows from its events: live ones are journaled and then applied, a resumed search
applies the journaled ones. The sampler, the rungs and the MLflow logger read the same events in both cases.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Arm = Literal["search", "control", "confirm"]
Outcome = Literal["completed", "pruned", "failed"]
Decision = Literal["continue", "stop"]


@dataclass(frozen=True)
class Began:
    """A search was launched: its resolved study, and where its results go."""

    name: str
    study: dict[str, Any]
    version: str
    tracking_uri: str


@dataclass(frozen=True)
class Extended:
    """More search trials were asked for than the study has."""

    trials: int


@dataclass(frozen=True)
class Enqueued:
    """Configurations of earlier searches, which the next search trials take in this order.

    Attributes:
        points: parameters by their MLflow names.
    """

    points: list[dict[str, Any]]


@dataclass(frozen=True)
class Confirming:
    """What is repeated with fresh seeds: of the controls when they were over, of the search when all were.

    Attributes:
        repeats: see `Repeat`; each becomes a trial, numbered in this order.
    """

    repeats: list[dict[str, int]]


@dataclass(frozen=True)
class Prepared:
    """Teacher and layers are known; a resumed search must find the same ones, and compute in the same precision."""

    teacher_sha256: str
    teacher_path: str
    teacher_accuracy: float
    precision: str = "fp32"


@dataclass(frozen=True)
class Suggested:
    """A trial's parameters.

    Attributes:
        number: of the trial, from 1.
        arm: search, control or confirm.
        control: name of the control arm, or empty.
        parameters: every parameter by its MLflow name.
        distributions: Optuna's JSON of those that Optuna chose.
        hints: the hint configuration they resolve to.
        selection: hint points and their clusters, as indices of candidates.
        data_seed: of the order of the images and their augmentation.
        init_seed: of the initial weights.
        confirms: number of the trial whose configuration a confirm trial repeats; 0: it is none.
    """

    number: int
    arm: Arm
    control: str
    parameters: dict[str, Any]
    distributions: dict[str, str]
    hints: dict[str, Any]
    selection: dict[str, Any]
    data_seed: int = 0
    init_seed: int = 0
    confirms: int = 0


@dataclass(frozen=True)
class Reported:
    """An epoch's figures; at a rung's end also what ASHA decided."""

    number: int
    epoch: int
    metrics: dict[str, float]
    decision: Decision | None


@dataclass(frozen=True)
class Checkpointed:
    """A trial can go on from here."""

    number: int
    epoch: int
    path: str


@dataclass(frozen=True)
class Retried:
    """A trial raised or lost its process, and begins again from its last checkpoint.

    Attributes:
        number: of the trial.
        attempt: how many attempts have failed, this one included.
        error: why, in one line.
    """

    number: int
    attempt: int
    error: str


@dataclass(frozen=True)
class Finished:
    """A trial ended for good.

    Attributes:
        number: of the trial.
        outcome: how.
        error: why it failed, in one line, or empty.
        traceback: of all its attempts, or empty.
    """

    number: int
    outcome: Outcome
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Tracked:
    """A trial has an MLflow run; number 0 is the parent."""

    number: int
    run_id: str


Event = (
    Began
    | Extended
    | Enqueued
    | Confirming
    | Prepared
    | Suggested
    | Reported
    | Checkpointed
    | Retried
    | Finished
    | Tracked
)

_KINDS: dict[str, type[Event]] = {
    "began": Began,
    "extended": Extended,
    "points": Enqueued,
    "confirm": Confirming,
    "prepared": Prepared,
    "suggestion": Suggested,
    "report": Reported,
    "checkpoint": Checkpointed,
    "retry": Retried,
    "outcome": Finished,
    "mlflow_run": Tracked,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as one JSON object, its kind under `event`."""
    return {"event": _NAMES[type(event)], **asdict(event)}


def event_from_dict(content: dict[str, Any]) -> Event:
    """The inverse of `event_to_dict`.

    Raises:
        ValueError: an unknown kind, or wrong fields.
    """
    fields = dict(content)
    kind = _KINDS.get(str(fields.pop("event", None)))
    # What the journal adds to each.
    for added in ("time", "crc"):
        fields.pop(added, None)
    if kind is None:
        raise ValueError(f"there is no event {content.get('event')!r}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"a {content['event']} has other fields: {error}") from error


@dataclass
class TrialHistory:
    """What is known of one trial."""

    suggested: Suggested
    reports: dict[int, Reported] = field(default_factory=dict)
    checkpoint: Checkpointed | None = None
    finished: Finished | None = None
    run_id: str | None = None
    retried: Retried | None = None

    @property
    def retries(self) -> int:
        """How often it was begun again."""
        return self.retried.attempt if self.retried else 0

    @property
    def number(self) -> int:
        """Our number of the trial."""
        return self.suggested.number

    @property
    def last(self) -> Reported | None:
        """The report of the latest epoch."""
        return self.reports[max(self.reports)] if self.reports else None

    def latest(self, metric: str) -> float | None:
        """A metric's value in the latest epoch that has it."""
        having = [epoch for epoch, report in self.reports.items() if metric in report.metrics]
        return self.reports[max(having)].metrics[metric] if having else None

    @property
    def stopped(self) -> bool:
        """Whether ASHA decided to stop it."""
        return any(report.decision == "stop" for report in self.reports.values())


class History:
    """The state of a search: the sum of its events."""

    def __init__(self) -> None:
        self.began: Began | None = None
        self.prepared: Prepared | None = None
        # What was added to the study's own trials, in order.
        self.additions: list[Extended | Confirming] = []
        # Configurations of earlier searches that no trial has taken yet.
        self.points: list[dict[str, Any]] = []
        self.trials: dict[int, TrialHistory] = {}
        self.parent_run_id: str | None = None

    def apply(self, event: Event) -> None:
        """Takes an event in.

        Raises:
            ValueError: the event contradicts those before it.
        """
        match event:
            case Began():
                self.began = event
            case Extended() | Confirming():
                self.additions.append(event)
            case Enqueued():
                self.points += event.points
            case Prepared():
                self.prepared = event
            case Suggested():
                if event.number in self.trials:
                    raise ValueError(f"trial {event.number} is suggested twice")
                self.trials[event.number] = TrialHistory(event)
                if event.arm == "search":
                    self.points = self.points[1:]
            case Reported():
                self._trial(event.number).reports[event.epoch] = event
            case Checkpointed():
                self._trial(event.number).checkpoint = event
            case Retried():
                self._trial(event.number).retried = event
            case Finished():
                self._trial(event.number).finished = event
            case Tracked(number=0):
                self.parent_run_id = event.run_id
            case Tracked():
                self._trial(event.number).run_id = event.run_id

    def unfinished(self) -> Iterator[TrialHistory]:
        """Trials without an outcome, in the order of their numbers."""
        return (trial for _, trial in sorted(self.trials.items()) if trial.finished is None)

    def outcomes(self) -> dict[str, int]:
        """How many trials ended how."""
        counts = {"completed": 0, "pruned": 0, "failed": 0}
        for trial in self.trials.values():
            if trial.finished is not None:
                counts[trial.finished.outcome] += 1
        return counts

    def _trial(self, number: int) -> TrialHistory:
        if number not in self.trials:
            raise ValueError(f"trial {number} was never suggested")
        return self.trials[number]
