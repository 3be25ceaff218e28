"""The kinds of values that a study's keys take, each with its rule."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..analysis.hint_selection import CONTROL_SELECTORS, SELECTORS
from ..analysis.layer_metrics import ALL_METRICS, check_metric, metric_names
from ..analysis.pairing import PAIRINGS
from ..distill.data import DATASETS, check_data_name
from ..distill.execution import COMPILE_MODES
from ..distill.loss_names import TOGETHER, check_hint_losses, check_logit_loss, names_together
from ..distill.loss_presets import LOSS_PRESETS
from ..distill.recipe import PRESETS, check_milestones
from ..models.errors import InputError, nearest
from ..models.own_code import is_own_code
from ..models.preprocessing import INTERPOLATIONS
from ..models.zoo import check_model_name

NO_DISTILLATION = "no_distillation"
KD_ONLY = "kd_only"
CONTROL_ARMS = (NO_DISTILLATION, KD_ONLY, *CONTROL_SELECTORS.names())
# Of studies and searches: they become folder names and parts of MLflow filters.
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,119}"
# Of a classifier, and of a ranking of the training images by their penultimate features.
CLASSIFIER_OBJECTIVES = ("val_accuracy", "val_macro_f1", "val_loss")
RETRIEVAL_OBJECTIVES = (
    "val_map_cosine",
    "val_map_l2",
    "val_map11_cosine",
    "val_map11_l2",
    "val_precision_at_100_cosine",
    "val_precision_at_100_l2",
)
OBJECTIVES = CLASSIFIER_OBJECTIVES + RETRIEVAL_OBJECTIVES
TRAINING_SECONDS = "training_seconds"
STUDENT_PARAMETERS = "student_parameters"
# What may be weighed against an objective.
COSTS = (TRAINING_SECONDS, STUDENT_PARAMETERS)
# Instead of a path: the weights that a library ships with a network.
PRETRAINED = "pretrained"
# Of the hardware that runs a trial.
AUTO_DEVICE = "auto"
AUTO_PRECISION = "auto"


def checked(check: Callable[[str], object]) -> AfterValidator:
    """A validator that keeps a name which `check` accepts; `check` raises InputError with the nearest right name."""

    def validate(name: str) -> str:
        check(name)
        return name

    return AfterValidator(validate)


def one_of(kind: str, options: Sequence[str]) -> AfterValidator:
    """A validator that keeps one of the options."""

    def check(name: str) -> None:
        if name not in options:
            raise InputError(f"unknown {kind} {name!r}; {nearest(name, options)}")

    return checked(check)


def _model(name: str) -> str:
    check_model_name(name)
    return _own_code(name)


def _data(name: str) -> str:
    check_data_name(name)
    if name in DATASETS:
        return name
    return str(Path(name).resolve()) if Path(name).is_dir() else _own_code(name)


def _own_code(name: str) -> str:
    """The name with an absolute path where it names a file, for workers start elsewhere."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).resolve()}:{function}" if is_own_code(name) and place.endswith(".py") else name


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _weights(place: str) -> str:
    return place if place == PRETRAINED else _absolute(place)


def _shares(milestones: tuple[float, ...]) -> tuple[float, ...]:
    check_milestones(milestones)
    return milestones


def _compile_mode(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    if value is True:
        raise InputError(f"true is no compile mode; choose one of {', '.join(COMPILE_MODES)}")
    return "off" if value is False else value


def several(value: Any) -> Any:
    """One name as a list of one."""
    return (value,) if isinstance(value, str) else value


def by_method(value: Any) -> Any:
    """A section written as the name of its method; `none` for no such section."""
    if value == "none":
        return None
    return {"method": value} if isinstance(value, str) else value


def distinct(names: Sequence[Any]) -> Sequence[Any]:
    """The names, or numbers, if none is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} is listed twice, but each may stand once; remove one")
    return names


def _hint_losses(names: str) -> str:
    check_hint_losses(names)
    found = [_own_code(name) for name in names_together(names)]
    for name in found:
        if TOGETHER in name:
            raise InputError(
                f"{name!r} has a {TOGETHER!r} in its path, which stands between hint losses; move it to another folder"
            )
    # The same file may be written in two ways.
    distinct(found)
    return TOGETHER.join(found)


def _one_hint_loss(name: str) -> str:
    if TOGETHER in name:
        raise InputError(f"{name!r} is several hint losses, but only one fits here; name one")
    return _hint_losses(name)


def _logit_loss(name: str) -> str:
    check_logit_loss(name)
    return _own_code(name)


Names = Annotated[tuple[str, ...], AfterValidator(distinct), Field(min_length=1)]
PathText = Annotated[str, AfterValidator(_absolute)]
WeightsText = Annotated[str, AfterValidator(_weights)]
MetricName = Annotated[str, checked(check_metric)]
SelectorName = Annotated[str, checked(SELECTORS.entry)]
PairingName = Annotated[str, checked(PAIRINGS.entry)]
HintLossName = Annotated[str, AfterValidator(_one_hint_loss)]
HintLossNames = Annotated[
    tuple[Annotated[str, AfterValidator(_hint_losses)], ...],
    BeforeValidator(several),
    AfterValidator(distinct),
    Field(min_length=1),
]
LogitLossNames = Annotated[
    tuple[Annotated[str, AfterValidator(_logit_loss)], ...],
    BeforeValidator(several),
    AfterValidator(distinct),
    Field(min_length=1),
]
ControlName = Annotated[str, one_of("control arm", CONTROL_ARMS)]
PresetName = Annotated[str, checked(PRESETS.entry)]
LossPresetName = Annotated[str, checked(LOSS_PRESETS.entry)]
DataName = Annotated[str, AfterValidator(_data)]
ModelName = Annotated[str, AfterValidator(_model)]
Milestones = Annotated[tuple[float, ...], AfterValidator(_shares)]
CompileMode = Annotated[str, BeforeValidator(_compile_mode), one_of("compile mode", COMPILE_MODES)]
InterpolationName = Annotated[str, one_of("interpolation", INTERPOLATIONS)]
ObjectiveName = Annotated[str, one_of("objective", OBJECTIVES)]
Metrics = Annotated[
    tuple[MetricName, ...],
    BeforeValidator(lambda value: metric_names() if value == ALL_METRICS else value),
    AfterValidator(distinct),
    Field(min_length=1),
]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Pixels = Annotated[int, Field(ge=1)]
ImageSize = Pixels | tuple[Pixels, Pixels]
Means = tuple[float, ...]
Deviations = tuple[Annotated[float, Field(gt=0)], ...]


class Section(BaseModel):
    """Part of a study: unknown keys are errors, and nothing changes after loading."""

    # Defaults, too: a 0 that is a 0.0 when the study is read again would be another key of the cache.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
