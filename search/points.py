"""Configurations of earlier searches as points of a study's space: what they were, and whether they fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..distill.loss_names import TOGETHER
from ..models.errors import InputError
from .export import HintFile
from .study import Study
from .suggestions import STUDENT_WIDTH, Parameters, chosen, hint_weights, suggest_parameters


def point_of(hints: HintFile, study: Study) -> Parameters:
    """The parameters of an exported configuration, as a search trial of the study has them.

    Args:
        hints: what `load_hints` read.
        study: whose search is to try it.

    Raises:
        InputError: it has no clustered hint points, or lies outside of the study's space.
    """
    exported, selection = hints.hints, hints.selection
    origin = f"trial {hints.trial} of {hints.search}"
    if selection is None or not selection.metrics:
        raise InputError(
            f"--points names {origin}, whose hint points no layer metrics chose; leave it out: controls are run anyway"
        )
    # Each point has all losses, in the same order.
    first = exported.pairs[0].teacher_layer
    weights = {pair.loss: pair.weight for pair in exported.pairs if pair.teacher_layer == first}
    losses = TOGETHER.join(weights)
    point: Parameters = {
        "hints.clusters": len(selection.indices),
        "hints.metrics": ",".join(selection.metrics),
        "hints.selector": selection.selector,
        "hints.pairing": selection.pairing,
        "loss.hint": losses,
        **{name: weights[loss] for name, loss in hint_weights(losses)},
        "weight.logit": exported.logit_weight,
        "weight.classification": exported.classification_weight,
        "lr": hints.training.recipe["lr"],
    }
    if exported.logit_weight > 0:
        point |= {"loss.logit": exported.logit_loss, "temperature": exported.temperature}
    if exported.embedding_weight > 0:
        point |= {"weight.embedding": exported.embedding_weight, "loss.embedding": exported.embedding_loss}
    if study.space.student_width:
        point[STUDENT_WIDTH] = hints.student.width
    try:
        choices_of(point, study)
    except InputError as error:
        raise InputError(
            f"--points names {origin}, which is outside of the study's space: {error}; widen it, or leave the point out"
        ) from error
    return point


def choices_of(point: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """What Optuna has to choose, by its own names, for a trial to have these parameters.

    Raises:
        InputError: the space has no such trial; names the key, its value and what the space has.
    """
    # Metrics stand in the order of the space.
    metrics = set(str(point["hints.metrics"]).split(","))
    known = [name for name in study.space.hints.metrics if name in metrics]
    if len(known) < len(metrics):
        unknown, there = min(metrics.difference(known)), ", ".join(study.space.hints.metrics)
        raise InputError(f"hints.metrics has {unknown}, but the space has {there}")
    wanted = {**point, "hints.metrics": ",".join(known)}
    reader = _PointReader(wanted)
    given = suggest_parameters(reader, study.space, "", 1, study.recipe.lr)
    if study.space.hints.clusters.auto:
        given["hints.clusters"] = wanted["hints.clusters"]
    for name in {**wanted, **given}:
        # What is off is 0 or not there.
        if (wanted.get(name) or 0) != (given.get(name) or 0):
            raise InputError(f"{name} is {wanted.get(name)}, but the space has {given.get(name)} alone")
    return reader.choices


class _PointReader:
    """Answers as Optuna would if it chose a certain point, and refuses what it could not choose."""

    def __init__(self, point: Parameters) -> None:
        self._point = point
        self.choices: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._between(name, low, high))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._between(name, low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._value(name)
        if value not in choices:
            raise InputError(f"{name} is {value}, but the space has {', '.join(map(str, choices))}")
        self.choices[name] = value
        return value

    def _between(self, name: str, low: float, high: float) -> Any:
        value = self._value(name)
        if not low <= value <= high:
            raise InputError(f"{name} is {value:g}, but the space has {low:g}..{high:g}")
        self.choices[name] = value
        return value

    def _value(self, name: str) -> Any:
        return chosen(name, self._point)
