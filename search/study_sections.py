"""The sections of a study file."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ..analysis.hint_selection import AUTO, HIGHEST_AUTOMATIC
from ..distill.dynamic_weights import DynamicWeights
from ..distill.execution import DEVICES, PRECISIONS
from ..distill.loss_names import TOGETHER, is_joint, names_together
from ..distill.recipe import BATCH_STATISTICS, CLASS_WEIGHTS, OPTIMIZERS, SCHEDULES, Recipe
from ..distill.warmup import ORDERS, Warmup
from ..models.errors import InputError
from .study_types import (
    AUTO_DEVICE,
    AUTO_PRECISION,
    CONTROL_ARMS,
    COSTS,
    CompileMode,
    ControlName,
    DataName,
    Deviations,
    Fraction,
    HintLossName,
    HintLossNames,
    ImageSize,
    InterpolationName,
    LogitLossNames,
    LossPresetName,
    Means,
    MetricName,
    Metrics,
    Milestones,
    ModelName,
    Names,
    ObjectiveName,
    PairingName,
    PathText,
    PresetName,
    Section,
    SelectorName,
    WeightsText,
    distinct,
    one_of,
)

# Of a claim: with two, the interval of a difference is nearly without bounds.
FEWEST_SEEDS = 3


class DataSection(Section):
    """Which images, and how they are split (see `DataSpec`)."""

    name: DataName = "digits"
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
    optimizer: Annotated[str, one_of("optimizer", OPTIMIZERS)] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    batch_size: Annotated[int, Field(ge=2)] = 64
    crop_padding: Annotated[int, Field(ge=0)] = 4
    flip: bool = True
    min_crop_area: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Annotated[str, one_of("schedule", SCHEDULES)] = "cosine"
    milestones: Milestones = (0.625, 0.75, 0.875)
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    class_weights: Annotated[str, one_of("class weighting", CLASS_WEIGHTS)] = "none"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0
    batch_norm: Annotated[str, one_of("statistics of batch norm", BATCH_STATISTICS)] = "share"

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

    model: ModelName
    width: Annotated[float, Field(gt=0)] = 1.0
    checkpoint: WeightsText | None = None
    preprocessing: PreprocessingSection = PreprocessingSection()


class StudentSection(ModelSection):
    """The student, and its layers that may be paired with hint points (by default the repeated blocks)."""

    candidates: Names | None = None


class UpperTeacherSection(ModelSection):
    """The network that a teacher between two sizes learns from: a checkpoint, or a recipe to train it by.

    Attributes:
        recipe: how it is trained.
        loss: hint loss of the two penultimate features, by which the teacher learns from it.
        classification: weight of the cross-entropy beside that loss; with 0 the teacher's logits mean nothing.
    """

    recipe: TeacherRecipeSection = TeacherRecipeSection()
    loss: HintLossName = "pkt_symmetric"
    classification: Annotated[float, Field(ge=0)] = 0


class TeacherSection(ModelSection):
    """The teacher: a checkpoint, or a recipe to train it by.

    Attributes:
        recipe: how it is trained.
        taught_by: a larger network, where the teacher is an auxiliary one that is distilled from it first.
    """

    recipe: TeacherRecipeSection = TeacherRecipeSection()
    taught_by: UpperTeacherSection | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.checkpoint and self.taught_by:
            raise InputError(
                f"teacher.checkpoint is {self.checkpoint}, but teacher.taught_by says how to train it; remove one"
            )
        return self

    @property
    def has_classifier(self) -> bool:
        """Whether its logits were trained."""
        return self.taught_by is None or self.taught_by.classification > 0


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

    @property
    def may_be_zero(self) -> bool:
        """Whether the term may be left out."""
        return self.low == 0 or self.optional


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
    metrics: Annotated[tuple[MetricName, ...], AfterValidator(distinct), Field(min_length=1)] = (
        "r2_cca",
        "cka_linear",
    )
    metric_weights: dict[MetricName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    selectors: Annotated[tuple[SelectorName, ...], AfterValidator(distinct), Field(min_length=1)] = (
        "paper_kmeans",
        "kmedoids",
    )
    pairings: Annotated[tuple[PairingName, ...], AfterValidator(distinct), Field(min_length=1)] = ("by_depth",)


class LossSpace(Section):
    """Which losses are searched, one name or several; the first of each kind is the control arms' default.

    Attributes:
        hint: of each hint pair; `at+crd` are two at once, each with a weight of its own.
        logit: of the logits.
        embedding: hint losses of the two penultimate features.
    """

    hint: HintLossNames = ("fitnet", "at", "sp")
    logit: LogitLossNames = ("kd",)
    embedding: HintLossNames = ("pkt_symmetric",)

    @model_validator(mode="after")
    def _single_embedding(self) -> Self:
        for name in self.embedding:
            if TOGETHER in name:
                raise InputError(f"embedding has {name!r}, but takes one hint loss at a time; name them separately")
        return self


class WeightSpace(Section):
    """Loss weights.

    Attributes:
        hint: β of each normalised hint term.
        by_loss: β of single hint losses, in the place of `hint`.
        logit: α of the logit loss.
        embedding: β of the term of the penultimate features; 0: there is none.
        classification: γ of the cross-entropy.
    """

    hint: Range = Range(low=0.01, high=100, default=1)
    by_loss: dict[HintLossName, Range] = Field(default_factory=dict)
    logit: Range = Range(low=0.1, high=10, default=1, optional=True)
    embedding: Range = Range(low=0, high=0, default=0)
    classification: Range = Range(low=1, high=1, default=1)

    def of_hint(self, loss: str) -> Range:
        """β of a hint loss."""
        return self.by_loss.get(loss, self.hint)


class Space(Section):
    """What Optuna chooses from.

    Attributes:
        preset: published losses of pairs and logits with their raw weights, in the place of those in `loss` and
            `weight`, of `normalise` and of `temperature`.
        hints: where the hint points come from.
        loss: which losses.
        weight: their weights.
        normalise: whether hint terms are divided by their size at the start; if not, weights are raw ones.
        temperature: τ of the logit loss.
        lr: learning rate; None: the recipe's.
        student_width: factors on the student's channel counts, in the place of `student.width`; empty: that one.
    """

    preset: LossPresetName | None = None
    hints: HintSpace = HintSpace()
    loss: LossSpace = LossSpace()
    weight: WeightSpace = WeightSpace()
    normalise: bool = True
    temperature: PositiveRange = PositiveRange(low=4, high=4, default=4)
    lr: PositiveRange | None = None
    student_width: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(distinct)] = ()

    @property
    def most_hint_terms(self) -> int:
        """The most terms of a configuration that read the teacher."""
        points = self.hints.clusters.high
        hints = max(
            sum(1 if is_joint(name) else points for name in names_together(names) if self.weight.of_hint(name).high > 0)
            for names in self.loss.hint
        )
        return hints + (self.weight.logit.high > 0) + (self.weight.embedding.high > 0)

    @property
    def hints_may_be_off(self) -> bool:
        """Whether there is a configuration with hint pairs of which none has a weight above 0."""
        return any(all(span.may_be_zero for span in spans) for spans in self._hint_spans)

    @property
    def _hint_spans(self) -> list[list[Range]]:
        """The ranges of the weights of each combination of hint losses."""
        return [[self.weight.of_hint(loss) for loss in names_together(names)] for names in self.loss.hint]


class ObjectiveSection(Section):
    """What the search improves.

    Attributes:
        metric: after the last rung, on the validation images.
        direction: of the metric.
        against: a cost that is to be small at the same time: measured seconds of training, or the size of the student.
            Nothing is stopped early then, for Optuna reports and prunes one objective only.
    """

    metric: ObjectiveName = "val_accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"
    against: Annotated[str, one_of("cost", COSTS)] | None = None


class ControlsSection(Section):
    """The baselines that are always run.

    Attributes:
        arms: which.
        trials: tuning budget split evenly over them; None: as many as the search has.
    """

    arms: Annotated[tuple[ControlName, ...], AfterValidator(distinct)] = CONTROL_ARMS
    trials: Annotated[int, Field(ge=0)] | None = None


class ConfirmSection(Section):
    """What is repeated with fresh seeds when search and controls are over.

    Attributes:
        configurations: the best so many of the search.
        controls: the best so many control arms, each by its best trial.
        seeds: pairs of a data seed and an init seed, the same for all that is confirmed; 0: nothing is confirmed.
    """

    configurations: Annotated[int, Field(ge=1)] = 2
    controls: Annotated[int, Field(ge=1)] = 2
    seeds: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if 0 < self.seeds < FEWEST_SEEDS:
            raise InputError(
                f"seeds is {self.seeds}, but a difference has no meaning below {FEWEST_SEEDS} seeds; set it to "
                f"{FEWEST_SEEDS} or more, or to 0 to confirm nothing"
            )
        return self


class BudgetSection(Section):
    """How much is trained.

    Attributes:
        trials: search trials, control arms not counted.
        rungs: epochs at which a complete annealed schedule ends and ASHA decides; the last is a full training.
        reduction: ASHA goes on with the best 1/reduction at each rung.
        startup_trials: random suggestions before Optuna's TPE takes over.
        checkpoint_seconds: a trial is checkpointed at rungs, and after so many seconds.
        retries: how often a trial that raised or lost its process is begun again from its last checkpoint. A loss that
            is not finite, or a configuration that the networks refuse, would be so again: such a trial fails at once.
        failures: after so many failed trials in a row a search is given up.
    """

    trials: Annotated[int, Field(ge=1)] = 20
    rungs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (30, 90)
    reduction: Annotated[float, Field(gt=1)] = 3
    startup_trials: Annotated[int, Field(ge=1)] = 10
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30
    retries: Annotated[int, Field(ge=0)] = 2
    failures: Annotated[int, Field(ge=1)] = 5

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise InputError(f"rungs are {list(self.rungs)}, but must be increasing; sort them")
        return self


class ResourcesSection(Section):
    """What one trial may use, and how it computes.

    Attributes:
        cpus_per_trial: also the number of torch's threads; of several workers each has its part, and at least one.
        gpus_per_trial: a share of one, or several, each of which then has a worker of its own.
        workers_per_trial: processes that train one trial together, each on its share of every batch; None: one a GPU.
        device: where trials compute; `auto`: on a GPU if they ask for one; `cpu`: nothing computes on a GPU, whatever
            is asked for.
        concurrent_trials: how many run at once; None: as many as fit.
        precision: `fp32`, `bf16`, or `auto`: bf16 where the hardware of the trials has it.
        compile: `off`; `default` for torch.compile, `reduce-overhead` for torch.compile with CUDA graphs.
    """

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    workers_per_trial: Annotated[int, Field(ge=1)] | None = None
    device: Annotated[str, one_of("device", (AUTO_DEVICE, *DEVICES))] = AUTO_DEVICE
    concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    precision: Annotated[str, one_of("precision", (AUTO_PRECISION, *PRECISIONS))] = AUTO_PRECISION
    compile: CompileMode = "off"

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        gpus, workers = self.gpus_per_trial, self.workers
        if gpus > 1 and gpus != int(gpus):
            raise InputError(f"gpus_per_trial is {gpus:g}, but a trial has a share of one GPU or whole ones; round it")
        if gpus and workers > 1 and gpus != workers:
            raise InputError(
                f"workers_per_trial is {workers}, but each worker has one of the {gpus:g} GPUs; leave it out"
            )
        if self.device == "cuda" and not gpus:
            raise InputError("device is cuda, but gpus_per_trial is 0; set it to what a trial may use")
        return self

    @property
    def workers(self) -> int:
        """Processes that train one trial together."""
        return self.workers_per_trial or max(1, int(self.gpus_per_trial))

    @property
    def cpus_per_worker(self) -> int:
        """Of each of them; also its number of torch's threads."""
        return max(1, self.cpus_per_trial // self.workers)

    @property
    def cpus(self) -> int:
        """Of all workers of a trial."""
        return self.cpus_per_worker * self.workers

    @property
    def gpus_per_worker(self) -> float:
        """Of each of them."""
        return self.gpus_per_trial / self.workers

    @property
    def on_gpu(self) -> bool:
        """Whether trials compute on a GPU."""
        return self.device == "cuda" or (self.device == AUTO_DEVICE and self.gpus_per_trial > 0)


class WarmupSection(Section):
    """A curriculum over the hint points before the main stage (see `Warmup`).

    Attributes:
        method: `indistill`, which a study may also write in the place of the whole section.
    """

    method: Literal["indistill"] = "indistill"
    loss: HintLossName = Warmup.loss
    base_epochs: Annotated[int, Field(ge=0)] = Warmup.base_epochs
    epochs: tuple[Annotated[int, Field(ge=1)], ...] = Warmup.epochs
    order: Annotated[str, one_of("order", ORDERS)] = Warmup.order
    lr: Annotated[float, Field(gt=0)] | None = Warmup.lr

    def warmup(self) -> Warmup:
        """The trainer's warm-up."""
        return Warmup(**self.model_dump(exclude={"method"}))


class DynamicWeightsSection(Section):
    """Weights of the distillation terms for each image, learned while the student trains (see `DynamicWeights`).

    Attributes:
        method: `hkd`, which a study may also write in the place of the whole section.
    """

    method: Literal["hkd"] = "hkd"
    hidden: int = DynamicWeights.hidden
    lr: float = DynamicWeights.lr
    weight_decay: float = DynamicWeights.weight_decay
    momentum: float = DynamicWeights.momentum
    ensemble: bool = DynamicWeights.ensemble
    meta: bool = DynamicWeights.meta
    meta_every: int = DynamicWeights.meta_every
    meta_images: int = DynamicWeights.meta_images
    meta_batch_size: int = DynamicWeights.meta_batch_size
    warmup_fraction: float = DynamicWeights.warmup_fraction

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        self.dynamic_weights()
        return self

    def dynamic_weights(self) -> DynamicWeights:
        """The trainer's settings."""
        return DynamicWeights(**self.model_dump(exclude={"method"}))


class TrackingSection(Section):
    """Where MLflow keeps the trials; None: `sqlite:///mlflow.db` in the present folder."""

    uri: str | None = None


class StorageSection(Section):
    """Where results lie: a folder that every node sees."""

    path: PathText = Field(default="results", validate_default=True)
