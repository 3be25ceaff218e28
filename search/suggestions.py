"""The space as Optuna is asked about it, define-by-run, and the names of what it is asked."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from ..analysis.hint_selection import AUTO
from ..analysis.importance import METRIC_SWITCH
from ..distill.loss_names import names_together
from .study_sections import Range, Space
from .study_types import KD_ONLY, NO_DISTILLATION

Parameters = dict[str, Any]
Choice = TypeVar("Choice", str, float)

# Optuna's names of its yes-or-no choices: an optional term after its weight, a layer metric after a prefix.
SWITCH = ".on"
# Between a weight's name and the loss whose own range it has.
OF_LOSS = "@"
STUDENT_WIDTH = "student.width"


class Chooser(Protocol):
    """What answers: an Optuna trial, or a configuration that is read back."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number of low..high."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of low..high."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""


def suggest_parameters(
    trial: Chooser, space: Space, control: str, control_clusters: int, recipe_lr: float
) -> Parameters:
    """Asks Optuna for what the arm leaves open, define-by-run.

    Args:
        trial: source of the values.
        space: what may be chosen.
        control: name of a control arm; empty for a search trial.
        control_clusters: number of hint points of a control.
        recipe_lr: the learning rate if the space does not search it.

    Returns:
        Every parameter by its MLflow name; weights that are off are 0.
    """
    parameters: Parameters = {}
    if not control:
        clusters = space.hints.clusters
        parameters["hints.clusters"] = (
            AUTO if clusters.auto else trial.suggest_int("hints.clusters", clusters.low, clusters.high)
        )
        parameters["hints.metrics"] = ",".join(_metric_subset(trial, space.hints.metrics))
        parameters["hints.selector"] = _choice(trial, "hints.selector", space.hints.selectors)
        parameters["hints.pairing"] = _choice(trial, "hints.pairing", space.hints.pairings)
    elif control not in (NO_DISTILLATION, KD_ONLY):
        parameters |= {"hints.clusters": control_clusters, "hints.metrics": "", "hints.selector": control}
    if "hints.selector" in parameters:
        parameters["loss.hint"] = _choice(trial, "loss.hint", space.loss.hint)
        for name, loss in hint_weights(parameters["loss.hint"]):
            span = space.weight.of_hint(loss)
            parameters[name] = _value(trial, _optuna_name(name, loss, space), span)
    else:
        parameters["weight.hint"] = 0.0
    parameters |= _other_weights(trial, space, control)
    parameters["lr"] = _value(trial, "lr", space.lr) if space.lr else recipe_lr
    if space.student_width:
        parameters[STUDENT_WIDTH] = float(_choice(trial, STUDENT_WIDTH, space.student_width))
    return parameters


def _other_weights(trial: Chooser, space: Space, control: str) -> Parameters:
    """Losses and weights of what is no hint of inner layers."""
    weight, parameters = space.weight, Parameters()
    distils = control != NO_DISTILLATION
    embeds = distils and weight.embedding.high > 0
    parameters["weight.logit"] = 0.0
    if distils:
        # KD only without its logit loss would be no distillation at all, unless the penultimate features are taught.
        may_be_off = weight.logit.optional and not (control == KD_ONLY and weight.embedding.may_be_zero)
        parameters["weight.logit"] = _value(trial, "weight.logit", weight.logit, may_be_off)
    if parameters["weight.logit"] > 0:
        parameters["loss.logit"] = _choice(trial, "loss.logit", space.loss.logit)
        parameters["temperature"] = _value(trial, "temperature", space.temperature)
    if embeds:
        parameters["weight.embedding"] = _value(trial, "weight.embedding", weight.embedding)
        if parameters["weight.embedding"] > 0:
            parameters["loss.embedding"] = _choice(trial, "loss.embedding", space.loss.embedding)
    taught = parameters["weight.logit"] > 0 or parameters.get("weight.embedding", 0.0) > 0
    if control in (NO_DISTILLATION, KD_ONLY) and not taught and weight.classification.may_be_zero:
        # Labels are all that is left.
        parameters["weight.classification"] = 1.0
    else:
        parameters["weight.classification"] = _value(trial, "weight.classification", weight.classification)
    return parameters


def hint_weights(losses: str) -> tuple[tuple[str, str], ...]:
    """The parameters that hold the weights of hint losses such as `at+crd`, and the loss of each."""
    return tuple(
        ("weight.hint" if number == 1 else f"weight.hint.{number}", loss)
        for number, loss in enumerate(names_together(losses), start=1)
    )


def default_parameters(space: Space, recipe_lr: float) -> Parameters:
    """What the first trial of a control arm takes: the study's defaults, every optional term on."""
    weight = space.weight
    ranges = {_optuna_name(name, loss, space): weight.of_hint(loss) for name, loss in hint_weights(space.loss.hint[0])}
    ranges |= {
        "weight.logit": weight.logit,
        "weight.embedding": weight.embedding,
        "weight.classification": weight.classification,
        "temperature": space.temperature,
    }
    if space.lr:
        ranges["lr"] = space.lr
    switches = {f"{name}{SWITCH}": True for name, r in ranges.items() if r.optional}
    values = {name: r.default for name, r in ranges.items()}
    losses = {
        "loss.hint": space.loss.hint[0],
        "loss.logit": space.loss.logit[0],
        "loss.embedding": space.loss.embedding[0],
    }
    width = {STUDENT_WIDTH: space.student_width[0]} if space.student_width else {}
    return {**losses, "lr": recipe_lr, **values, **switches, **width}


def _optuna_name(name: str, loss: str, space: Space) -> str:
    """Optuna's name of a weight: a loss with a range of its own has a distribution of its own."""
    return f"{name}{OF_LOSS}{loss}" if loss in space.weight.by_loss else name


def chosen(name: str, parameters: Parameters) -> Any:
    """What Optuna chose under that name, from parameters that show only what its switches led to."""
    if name in parameters:
        return parameters[name]
    value = parameters.get(name.removesuffix(SWITCH).partition(OF_LOSS)[0])
    if value is not None:
        return value > 0 if name.endswith(SWITCH) else value
    return name.removeprefix(METRIC_SWITCH) in parameters["hints.metrics"].split(",")


def _metric_subset(trial: Chooser, metrics: tuple[str, ...]) -> list[str]:
    """A subset that is never empty: the last metric is asked about only if another is in, and is in otherwise."""
    subset = [m for m in metrics[:-1] if trial.suggest_categorical(f"{METRIC_SWITCH}{m}", [True, False])]
    last = metrics[-1]
    if not subset or trial.suggest_categorical(f"{METRIC_SWITCH}{last}", [True, False]):
        subset.append(last)
    return subset


def _choice(trial: Chooser, name: str, options: tuple[Choice, ...]) -> Choice:
    found: Choice = options[0] if len(options) == 1 else trial.suggest_categorical(name, options)
    return found


def _value(trial: Chooser, name: str, span: Range, may_be_off: bool | None = None) -> float:
    off_allowed = span.optional if may_be_off is None else may_be_off
    if off_allowed and not trial.suggest_categorical(f"{name}{SWITCH}", [True, False]):
        return 0.0
    return trial.suggest_float(name, span.low, span.high, log=True) if span.searched else span.low
