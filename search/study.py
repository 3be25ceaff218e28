"""The study file: one schema, and one line for everything that can be wrong with it."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..analysis.hint_selection import AUTO, CONTROL_SELECTORS, HIGHEST_AUTOMATIC, SELECTORS
from ..analysis.layer_metrics import ALL_METRICS, check_metric, metric_names
from ..analysis.pairing import PAIRINGS
from ..distill.data import DATASETS, DataSpec, check_data_name
from ..distill.execution import COMPILE_MODES, PRECISIONS
from ..distill.losses import HINT_LOSSES, LOGIT_LOSSES
from ..distill.recipe import CLASS_WEIGHTS, PRESETS, SCHEDULES, Preset, Recipe, check_milestones
from ..models.errors import InputError, nearest
from ..models.own_code import is_own_code
from ..models.preprocessing import INTERPOLATIONS
from ..models.zoo import check_model_name
from .study_file import read_study

NO_DISTILLATION = "no_distillation"
KD_ONLY = "kd_only"
CONTROL_ARMS = (NO_DISTILLATION, KD_ONLY, *CONTROL_SELECTORS.names())
# Of studies and searches: they become folder names and parts of MLflow filters.
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,119}"
OBJECTIVES = ("val_accuracy", "val_macro_f1", "val_loss")
# Instead of a path: the weights that a library ships with a network.
PRETRAINED = "pretrained"
# Of the hardware that runs a trial.
AUTO_PRECISION = "auto"


def _checked(check: Callable[[str], object]) -> AfterValidator:
    """A validator that keeps a name which `check` accepts; `check` raises InputError with the nearest right name."""

    def validate(name: str) -> str:
        check(name)
        return name

    return AfterValidator(validate)


def _one_of(kind: str, options: Sequence[str]) -> AfterValidator:
    def check(name: str) -> None:
        if name not in options:
            raise InputError(f"unknown {kind} {name!r}; {nearest(name, options)}")

    return _checked(check)


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


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _distinct(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name!r} is listed twice, but each may stand once; remove one")
    return names


Names = Annotated[tuple[str, ...], AfterValidator(_distinct), Field(min_length=1)]
PathText = Annotated[str, AfterValidator(_absolute)]
WeightsText = Annotated[str, AfterValidator(_weights)]
MetricName = Annotated[str, _checked(check_metric)]
SelectorName = Annotated[str, _checked(SELECTORS.entry)]
PairingName = Annotated[str, _checked(PAIRINGS.entry)]
HintLossName = Annotated[str, _checked(HINT_LOSSES.entry)]
LogitLossName = Annotated[str, _checked(LOGIT_LOSSES.entry)]
ControlName = Annotated[str, _one_of("control arm", CONTROL_ARMS)]
PresetName = Annotated[str, _checked(PRESETS.entry)]
InterpolationName = Annotated[str, _one_of("interpolation", INTERPOLATIONS)]
ObjectiveName = Annotated[str, _one_of("objective", OBJECTIVES)]
Metrics = Annotated[
    tuple[MetricName, ...],
    BeforeValidator(lambda value: metric_names() if value == ALL_METRICS else value),
    AfterValidator(_distinct),
    Field(min_length=1),
]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Pixels = Annotated[int, Field(ge=1)]
ImageSize = Pixels | tuple[Pixels, Pixels]
Means = tuple[float, ...]
Deviations = tuple[Annotated[float, Field(gt=0)], ...]


class Section(BaseModel):
    """Part of a study: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """Which images, and how they are split (see `DataSpec`)."""

    name: Annotated[str, AfterValidator(_data)] = "digits"
    root: PathText | None = None
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    validation_fraction: Fraction = 0.2
    test_fraction: Fraction = 0.2
    mean: Means | None = None
    sd: Deviations | None = None
    size: ImageSize | None = None
    interpolation: InterpolationName = "bilinear"
    crop_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    memory_gb: Annotated[float, Field(ge=0)] = 4
    workers: Annotated[int, Field(ge=1)] = 2
    unreadable: Annotated[int, Field(ge=0)] = 0
    classes: Annotated[int, Field(ge=2)] | None = None


class RecipeSection(Section):
    """How the student is trained (see `Recipe`).

    Attributes:
        preset: a published recipe, for the keys that are not given.
    """

    preset: PresetName | None = None
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    batch_size: Annotated[int, Field(ge=2)] = 64
    crop_padding: Annotated[int, Field(ge=0)] = 4
    flip: bool = True
    min_crop_area: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Annotated[str, _one_of("schedule", SCHEDULES)] = "cosine"
    milestones: Annotated[tuple[float, ...], AfterValidator(_shares)] = (0.625, 0.75, 0.875)
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    class_weights: Annotated[str, _one_of("class weighting", CLASS_WEIGHTS)] = "none"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0

    def recipe(self, lr: float | None = None) -> Recipe:
        """The trainer's recipe, with another learning rate if one is given."""
        values = self.model_dump(exclude={"epochs", "preset"})
        return Recipe(**{**values, "lr": values["lr"] if lr is None else lr})


class TeacherRecipeSection(RecipeSection):
    """How the teacher is trained if there is no checkpoint."""

    epochs: Annotated[int, Field(ge=1)] = 240


class PreprocessingSection(Section):
    """How a network takes its images; what is not given is as its pretrained weights, else as the data have it."""

    size: ImageSize | None = None
    mean: Means | None = None
    sd: Deviations | None = None
    interpolation: InterpolationName | None = None


class ModelSection(Section):
    """A network.

    Attributes:
        model: a name of the zoo, `torchvision:NAME`, `timm:NAME`, or one's own factory.
        width: factor on every inner channel count; of the zoo's networks only.
        checkpoint: file of the weights it has at the start, or `pretrained` for those its library ships.
        preprocessing: how it takes its images.
    """

    model: Annotated[str, AfterValidator(_model)]
    width: Annotated[float, Field(gt=0)] = 1.0
    checkpoint: WeightsText | None = None
    preprocessing: PreprocessingSection = PreprocessingSection()


class StudentSection(ModelSection):
    """The student, and its layers that may be paired with hint points (by default the repeated blocks)."""

    candidates: Names | None = None


class TeacherSection(ModelSection):
    """The teacher: a checkpoint, or a recipe to train it by."""

    recipe: TeacherRecipeSection = TeacherRecipeSection()


class LayersSection(Section):
    """What is measured of the teacher's layers, and on how much.

    Attributes:
        metrics: layer metrics, or `all`.
        images: the most training images that are read.
        chunk: images an actor reads in one call; also the minibatch of Gram metrics.
        batch: images of a forward pass; None: 64 on a CPU, a whole chunk on a GPU.
        actors: how many read at once; None: one a GPU, else one a CPU.
        candidates: module paths or patterns such as `layer*.?`; None: the outputs of repeated blocks.
        memory_gb: what the sums may take in an actor, and on the driver; wide layers are projected to fit.
        bootstraps: redrawings of the image groups, for the stability of hint points; 0: none.
    """

    metrics: Metrics = ("r2_cca", "cka_linear", "effective_rank", "class_separation")
    images: Annotated[int, Field(ge=2)] = 10_000
    chunk: Annotated[int, Field(ge=1)] = 256
    batch: Annotated[int, Field(ge=1)] | None = None
    actors: Annotated[int, Field(ge=1)] | None = None
    candidates: Names | None = None
    memory_gb: Annotated[float, Field(gt=0)] = 4
    bootstraps: Annotated[int, Field(ge=0)] = 20


class Range(Section):
    """A number that is searched between `low` and `high`, or fixed if both are equal (written as one number).

    Attributes:
        low: smallest value.
        high: largest value.
        default: what control arms use; the geometric mean if it is not given.
        optional: whether the search may also leave the term out (weight 0), as a choice of its own.
    """

    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(ge=0)]
    default: float
    optional: bool = False

    @model_validator(mode="before")
    @classmethod
    def _number_or_ends(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"low": value, "high": value, "default": value}
        if isinstance(value, dict) and "default" not in value:
            try:
                return {**value, "default": (float(value["low"]) * float(value["high"])) ** 0.5}
            except (KeyError, TypeError, ValueError):
                return value
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise InputError(f"low is {self.low:g}, but must not be above high, {self.high:g}; swap them")
        if not self.low <= self.default <= self.high:
            raise InputError(f"default is {self.default:g}, but must lie in {self.low:g}..{self.high:g}; change it")
        if self.searched and self.low == 0:
            raise InputError("low is 0, but the range is searched log-uniformly; use a small low with `optional: true`")
        return self

    @property
    def searched(self) -> bool:
        """Whether the value varies."""
        return self.high > self.low


class PositiveRange(Range):
    """A range of what divides or steps: never 0, hence never left out."""

    low: Annotated[float, Field(gt=0)]
    optional: Literal[False] = False


class ClusterRange(Section):
    """How many hint points there are: searched, or for `auto` the number with the best silhouette."""

    low: Annotated[int, Field(ge=1)]
    high: Annotated[int, Field(ge=1)]
    auto: bool = False

    @model_validator(mode="before")
    @classmethod
    def _number_or_ends(cls, value: Any) -> Any:
        if value == AUTO:
            return {"low": 2, "high": HIGHEST_AUTOMATIC, "auto": True}
        return {"low": value, "high": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise InputError(f"low is {self.low}, but must not be above high, {self.high}; swap them")
        return self


class HintSpace(Section):
    """Where the hint points come from, and how they are paired.

    Attributes:
        clusters: number of hint points.
        metrics: layer metrics of which subsets are combined; `layers.metrics` has to measure them.
        metric_weights: of a metric in a combination, 1 if it is not given.
        selectors: how the candidates are clustered.
        pairings: how hint points find their student layers.
    """

    clusters: ClusterRange = ClusterRange(low=1, high=5)
    metrics: Annotated[tuple[MetricName, ...], AfterValidator(_distinct), Field(min_length=1)] = (
        "r2_cca",
        "cka_linear",
    )
    metric_weights: dict[MetricName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    selectors: Annotated[tuple[SelectorName, ...], AfterValidator(_distinct), Field(min_length=1)] = (
        "paper_kmeans",
        "kmedoids",
    )
    pairings: Annotated[tuple[PairingName, ...], AfterValidator(_distinct), Field(min_length=1)] = ("by_depth",)


class LossSpace(Section):
    """Which losses are searched, one name or several; the first of each kind is the control arms' default."""

    hint: Annotated[
        tuple[HintLossName, ...], BeforeValidator(_several), AfterValidator(_distinct), Field(min_length=1)
    ] = ("fitnet", "at", "sp")
    logit: Annotated[
        tuple[LogitLossName, ...], BeforeValidator(_several), AfterValidator(_distinct), Field(min_length=1)
    ] = ("kd",)


class WeightSpace(Section):
    """Loss weights: β of each normalised hint term, α of the logit loss, γ of the cross-entropy."""

    hint: Range = Range(low=0.01, high=100, default=1)
    logit: Range = Range(low=0.1, high=10, default=1, optional=True)
    classification: Range = Range(low=1, high=1, default=1)


class Space(Section):
    """What Optuna chooses from."""

    hints: HintSpace = HintSpace()
    loss: LossSpace = LossSpace()
    weight: WeightSpace = WeightSpace()
    temperature: PositiveRange = PositiveRange(low=4, high=4, default=4)
    lr: PositiveRange | None = None


class ObjectiveSection(Section):
    """What the search improves."""

    metric: ObjectiveName = "val_accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"


class ControlsSection(Section):
    """The baselines that are always run.

    Attributes:
        arms: which.
        trials: tuning budget split evenly over them; None: as many as the search has.
    """

    arms: Annotated[tuple[ControlName, ...], AfterValidator(_distinct)] = CONTROL_ARMS
    trials: Annotated[int, Field(ge=0)] | None = None


class BudgetSection(Section):
    """How much is trained.

    Attributes:
        trials: search trials, control arms not counted.
        rungs: epochs at which a complete annealed schedule ends and ASHA decides; the last is a full training.
        reduction: ASHA goes on with the best 1/reduction at each rung.
        startup_trials: random suggestions before Optuna's TPE takes over.
        checkpoint_seconds: a trial is checkpointed at rungs, and after so many seconds.
    """

    trials: Annotated[int, Field(ge=1)] = 20
    rungs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (30, 90)
    reduction: Annotated[float, Field(gt=1)] = 3
    startup_trials: Annotated[int, Field(ge=1)] = 10
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise InputError(f"rungs are {list(self.rungs)}, but must be increasing; sort them")
        return self


class ResourcesSection(Section):
    """What one trial may use, and how it computes.

    Attributes:
        cpus_per_trial: also the number of torch's threads.
        gpus_per_trial: a share of one, or several.
        concurrent_trials: how many run at once; None: as many as fit.
        precision: `fp32`, `bf16`, or `auto`: bf16 where the hardware of the trials has it.
        compile: `off`; `default` for torch.compile, `reduce-overhead` for torch.compile with CUDA graphs.
    """

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    precision: Annotated[str, _one_of("precision", (AUTO_PRECISION, *PRECISIONS))] = AUTO_PRECISION
    compile: Annotated[str, BeforeValidator(_compile_mode), _one_of("compile mode", COMPILE_MODES)] = "off"


class TrackingSection(Section):
    """Where MLflow keeps the trials; None: `sqlite:///mlflow.db` in the present folder."""

    uri: str | None = None


class StorageSection(Section):
    """Where results lie: a folder that every node sees."""

    path: PathText = Field(default="results", validate_default=True)


class Study(Section):
    """A whole study."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", max_length=100)]
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: TeacherSection
    student: StudentSection
    data: DataSection = DataSection()
    layers: LayersSection = LayersSection()
    space: Space = Space()
    objective: ObjectiveSection = ObjectiveSection()
    recipe: RecipeSection = RecipeSection()
    controls: ControlsSection = ControlsSection()
    budget: BudgetSection = BudgetSection()
    resources: ResourcesSection = ResourcesSection()
    tracking: TrackingSection = TrackingSection()
    # Made anew for each study: the present folder is part of it.
    storage: StorageSection = Field(default_factory=StorageSection)

    @model_validator(mode="before")
    @classmethod
    def _with_presets(cls, content: Any) -> Any:
        return _filled_by_presets(content) if isinstance(content, dict) else content

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for metric in self.space.hints.metrics:
            if metric not in self.layers.metrics:
                raise InputError(
                    f"space.hints.metrics has {metric!r}, which layers.metrics does not measure; "
                    f"add it there ({', '.join(self.layers.metrics)})"
                )
        for metric in self.space.hints.metric_weights:
            if metric not in self.space.hints.metrics:
                raise InputError(
                    f"space.hints.metric_weights has {metric!r}, which is not in space.hints.metrics; "
                    f"{nearest(metric, self.space.hints.metrics)}"
                )
        if self.space.weight.classification.high == 0 or self.space.weight.classification.optional:
            raise InputError(
                f"space.weight.classification may be 0, but {self.objective.metric} needs a trained classifier; "
                "set it to 1"
            )
        wanted = "minimize" if self.objective.metric == "val_loss" else "maximize"
        if self.objective.direction != wanted:
            raise InputError(
                f"objective.direction is {self.objective.direction!r}, but {self.objective.metric} is to {wanted}; "
                f"set objective.direction to {wanted}"
            )
        if self.recipe.nesterov and self.recipe.momentum == 0:
            raise InputError("recipe.nesterov is true, but recipe.momentum is 0; set nesterov to false")
        return self

    @property
    def control_trials(self) -> int:
        """Control trials in total."""
        if not self.controls.arms:
            return 0
        return self.budget.trials if self.controls.trials is None else self.controls.trials

    def data_spec(self) -> DataSpec:
        """The data section as `distill` takes it."""
        return DataSpec(**self.data.model_dump(), seed=self.seed)

    def own_code(self) -> dict[str, str]:
        """The user's own code that the study runs, by key."""
        named = {"teacher": self.teacher.model, "student": self.student.model, "data": self.data.name}
        return {key: name for key, name in named.items() if is_own_code(name)}

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain types; loading it again gives the same study."""
        content: dict[str, Any] = self.model_dump(mode="json")
        return content


def _filled_by_presets(content: dict[str, Any]) -> dict[str, Any]:
    """The study with the recipes, and the epochs, of the presets it names, where it says nothing itself."""
    filled = dict(content)
    preset, recipe = _preset(content.get("recipe"), content.get("student"))
    if preset is not None:
        filled["recipe"] = recipe
        budget = content.get("budget", {})
        if isinstance(budget, dict):
            filled["budget"] = {"rungs": [preset.epochs], **budget}
    teacher = content.get("teacher")
    if isinstance(teacher, dict):
        preset, recipe = _preset(teacher.get("recipe"), teacher)
        if preset is not None:
            filled["teacher"] = {**teacher, "recipe": {"epochs": preset.epochs, **recipe}}
    return filled


def _preset(recipe: Any, network: Any) -> tuple[Preset | None, dict[str, Any]]:
    """The preset that a recipe section names, and the section filled by it; the schema checks what is no name."""
    name = recipe.get("preset") if isinstance(recipe, dict) else None
    if not isinstance(name, str) or name not in PRESETS:
        return None, {}
    preset = PRESETS.get(name)
    model = network.get("model") if isinstance(network, dict) else None
    return preset, {**asdict(preset.recipe_of(str(model))), **recipe}


def load_study(study: str, overrides: Sequence[str] = ()) -> Study:
    """Loads and validates a study.

    Args:
        study: path of a YAML file, or the name of a study that ships with hintsearch.
        overrides: `KEY=VALUE` with a dotted key and a YAML value, applied in order.

    Raises:
        InputError: anything wrong with it, in one line.
    """
    content = read_study(study, overrides)
    return validate_study(content, study)


def validate_study(content: dict[str, Any], origin: str) -> Study:
    """Validates a study's content; `origin` is named in the message.

    Raises:
        InputError: the first thing that is wrong, in one line.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error, Study)}") from error


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first problem of a validation as one line: key, value, rule, mend; unknown keys before all others.

    A misspelt key is a missing one, too, and saying so would not help.
    """
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    # Pydantic also names which of several types it tried, such as `constrained-int`.
    key = ".".join(str(part) for part in first["loc"] if not re.search(r"[-\[(]", str(part)))
    if first["type"] == "extra_forbidden":
        known = _fields_at(schema, first["loc"][:-1])
        return f"unknown key {key!r}; {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; add it"
    if first["type"] == "value_error":
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        return f"{key}: {reason}" if key else reason
    value = _as_json(first["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    return f"{key} is {shown}, but {first['msg'][0].lower()}{first['msg'][1:]}; change {key}"


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        # YAML can make what JSON cannot say: dates as keys, lists that hold themselves.
        return str(value)


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that the schema has at a location."""
    current = schema
    for part in location:
        field = current.model_fields.get(str(part))
        annotation = field.annotation if field else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not models:
            break
        current = models[0]
    return list(current.model_fields)
