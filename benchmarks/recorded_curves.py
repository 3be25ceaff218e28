"""Learning curves of real trials, recorded once (`record_curves.py`) and looked up by configuration."""

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.models.candidates import Candidate
from hintsearch.search.study import Study, validate_study

DIGITS = Path(__file__).parent / "curves" / "digits.json.gz"


@dataclass(frozen=True)
class RecordedTrial:
    """One training that nothing stopped but a failure.

    Attributes:
        arm: search or control.
        control: name of the control arm, or empty.
        seed: of data order and initial weights.
        parameters: as the searcher chose them.
        points: the hint points, 1-based indices of the teacher's candidates.
        curves: of each metric, its value after every epoch; empty if the first epoch failed.
        failure: why it went no further; empty if it came to its end.
    """

    arm: str
    control: str
    seed: int
    parameters: dict[str, Any]
    points: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]
    failure: str = ""

    @property
    def epochs(self) -> int:
        """How many it reported."""
        return max(map(len, self.curves.values()), default=0)

    def metrics(self, epoch: int) -> dict[str, float]:
        """What it reported after an epoch, counted from 1."""
        return {name: values[epoch - 1] for name, values in self.curves.items()}


@dataclass(frozen=True)
class Recording:
    """Curves of one study, with all that its searcher needs to make configurations.

    Attributes:
        study: resolved, as it was recorded.
        teacher: the teacher's candidates.
        student: the student's candidates.
        distances: the teacher's layer metrics, without their bootstraps.
        trials: search trials and controls.
        machine: where they were recorded, and when.
    """

    study: dict[str, Any]
    teacher: tuple[Candidate, ...]
    student: tuple[Candidate, ...]
    distances: LayerDistances
    trials: tuple[RecordedTrial, ...]
    machine: str

    def search_trials(self) -> tuple[RecordedTrial, ...]:
        """Those of the search."""
        return tuple(trial for trial in self.trials if trial.arm == "search")

    def controls(self, name: str) -> tuple[RecordedTrial, ...]:
        """The runs of a control arm with the study's defaults, one a seed."""
        return tuple(trial for trial in self.trials if trial.control == name)


class NearestCurve:
    """Gives a configuration the curve of the nearest recorded one.

    Near are only those with the same hint loss and with the logit loss on or off alike. Among them the distance is
    Euclidean over these coordinates, each of which goes from 0 to 1: the logarithms of hint weight, logit weight and
    temperature (the last two only if the logit loss is on), each over the width of its range in the study, and the
    share of hint points that the two do not have in common (1 − Jaccard index), through which number of clusters,
    layer metrics and selector act. One neighbour alone is taken, so that every curve is one that was really trained.

    Args:
        recording: its search trials are looked up.
    """

    def __init__(self, recording: Recording) -> None:
        study = validate_study(recording.study, "the recorded study")
        self._ranges = _log_widths(study)
        self._cells: dict[tuple[Any, ...], list[RecordedTrial]] = {}
        for trial in recording.search_trials():
            self._cells.setdefault(_cell(trial.parameters), []).append(trial)

    def find(self, parameters: Mapping[str, Any], points: Iterable[int]) -> RecordedTrial:
        """The nearest recorded trial.

        Args:
            parameters: of a search trial.
            points: its hint points, 1-based.
        """
        wanted = frozenset(points)
        return min(self._cells[_cell(parameters)], key=lambda trial: self._distance(trial, parameters, wanted))

    def distance(self, trial: RecordedTrial, parameters: Mapping[str, Any], points: Iterable[int]) -> float:
        """How far a configuration is from a recorded one of the same losses."""
        return self._distance(trial, parameters, frozenset(points))

    def _distance(self, trial: RecordedTrial, parameters: Mapping[str, Any], points: frozenset[int]) -> float:
        steps = [
            math.log(trial.parameters[name] / parameters[name]) / width
            for name, width in self._ranges.items()
            if trial.parameters.get(name) and parameters.get(name)
        ]
        theirs = frozenset(trial.points)
        steps.append(1 - len(points & theirs) / len(points | theirs))
        return math.hypot(*steps)


def _cell(parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    return parameters["loss.hint"], parameters["weight.logit"] > 0


def _log_widths(study: Study) -> dict[str, float]:
    spans = {
        "weight.hint": study.space.weight.hint,
        "weight.logit": study.space.weight.logit,
        "temperature": study.space.temperature,
    }
    return {name: math.log(span.high / span.low) for name, span in spans.items() if span.searched}


def write_recording(path: Path, recording: Recording) -> None:
    """Writes a recording as gzipped JSON, the same bytes for the same content."""
    content = {
        "study": recording.study,
        "teacher": [asdict(candidate) for candidate in recording.teacher],
        "student": [asdict(candidate) for candidate in recording.student],
        "distances": {name: matrix.tolist() for name, matrix in recording.distances.distances.items()},
        "scores": {name: values.tolist() for name, values in recording.distances.scores.items()},
        "images": recording.distances.images,
        "machine": recording.machine,
        "trials": [asdict(trial) for trial in recording.trials],
    }
    text = json.dumps(content, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_recording(path: Path) -> Recording:
    """The inverse of `write_recording`."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    teacher = tuple(Candidate(**candidate) for candidate in content["teacher"])
    return Recording(
        content["study"],
        teacher,
        tuple(Candidate(**candidate) for candidate in content["student"]),
        LayerDistances(
            tuple(candidate.path for candidate in teacher),
            {name: np.array(matrix) for name, matrix in content["distances"].items()},
            {name: np.array(values) for name, values in content["scores"].items()},
            content["images"],
        ),
        tuple(_trial(trial) for trial in content["trials"]),
        content["machine"],
    )


def _trial(content: dict[str, Any]) -> RecordedTrial:
    curves = {name: tuple(values) for name, values in content.pop("curves").items()}
    return RecordedTrial(points=tuple(content.pop("points")), curves=curves, **content)
