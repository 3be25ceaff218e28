"""The study file: one schema, and one line for everything that can be wrong with it."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from ..analysis.pairing import BY_SIMILARITY
from ..distill.data import DataSpec
from ..distill.feature_losses import STRONGEST_CHANNELS
from ..distill.loss_names import TOGETHER, is_joint, names_together
from ..distill.loss_presets import LOSS_PRESETS
from ..distill.recipe import PRESETS, Preset
from ..distill.warmup import Warmup
from ..distill.worker_limits import check_shared_training
from ..models.errors import InputError, nearest
from ..models.own_code import is_own_code
from .study_file import read_study
from .study_sections import (
    BudgetSection,
    ConfirmSection,
    ControlsSection,
    DataSection,
    DynamicWeightsSection,
    LayersSection,
    LossSpace,
    ObjectiveSection,
    RecipeSection,
    ResourcesSection,
    Space,
    StorageSection,
    StudentSection,
    TeacherSection,
    TrackingSection,
    WarmupSection,
)
from .study_types import (
    CLASSIFIER_OBJECTIVES,
    NAME_PATTERN,
    RETRIEVAL_OBJECTIVES,
    STUDENT_PARAMETERS,
    Section,
    by_method,
)


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
    warmup: Annotated[WarmupSection | None, BeforeValidator(by_method)] = None
    dynamic_weights: Annotated[DynamicWeightsSection | None, BeforeValidator(by_method)] = None
    controls: ControlsSection = ControlsSection()
    confirm: ConfirmSection = ConfirmSection()
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
        if self.objective.metric in CLASSIFIER_OBJECTIVES and self.space.weight.classification.may_be_zero:
            raise InputError(
                f"space.weight.classification may be 0, but {self.objective.metric} needs a trained classifier; "
                f"set it to 1, or the objective to {RETRIEVAL_OBJECTIVES[0]}"
            )
        weight = self.space.weight
        others = (weight.classification, weight.logit, weight.embedding)
        if self.space.hints_may_be_off and all(span.may_be_zero for span in others):
            raise InputError(
                "space.weight lets every loss be 0 at once, and then there is nothing to learn; let one of them be "
                "always on"
            )
        if weight.logit.high > 0 and not self.teacher.has_classifier:
            raise InputError(
                "space.weight.logit may be above 0, but teacher.taught_by.classification is 0, so the teacher has no "
                "trained logits; set space.weight.logit to 0, or let the teacher learn labels, too"
            )
        if self.dynamic_weights and self.resources.compile != "off":
            raise InputError(
                f"resources.compile is {self.resources.compile!r}, but dynamic_weights differentiate the student "
                "forwards, which compiled code is not made for; set it to off"
            )
        if self.dynamic_weights and self.space.most_hint_terms < 2:
            raise InputError(
                "dynamic_weights share weight among at least 2 distillation terms, but no configuration of this space "
                "has as many; let space.weight.logit be above 0, or add hint losses or clusters"
            )
        device = "cuda" if self.resources.on_gpu else "cpu"
        check_shared_training(self.resources.workers, device, self.recipe.recipe(), self.data.unreadable)
        self._check_effective()
        self._check_widths()
        if self.warmup and is_joint(self.warmup.loss):
            raise InputError(
                f"warmup.loss is {self.warmup.loss!r}, which is of all hint pairs together, but a warm-up learns "
                f"one after the other; choose another, such as {STRONGEST_CHANNELS}"
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

    def _check_effective(self) -> None:
        """Raises `InputError` for keys that would change nothing."""
        space = self.space
        if space.loss.embedding != LossSpace().embedding and space.weight.embedding.high == 0:
            raise InputError(
                f"space.loss.embedding is {list(space.loss.embedding)}, but space.weight.embedding is 0, which leaves "
                "it out; set space.weight.embedding above 0"
            )
        named = {name for names in space.loss.hint for name in names_together(names)}
        for loss in space.weight.by_loss:
            if loss not in named:
                raise InputError(
                    f"space.weight.by_loss has {loss!r}, which is not in space.loss.hint; {nearest(loss, named)}"
                )
        if self.warmup and self.warmup.epochs and self.warmup.base_epochs != Warmup.base_epochs:
            raise InputError(
                f"warmup.base_epochs is {self.warmup.base_epochs}, but warmup.epochs says how long each lesson is; "
                "remove one"
            )

    def _check_widths(self) -> None:
        """Raises `InputError` where several widths of the student do not fit what else the study says."""
        if not self.space.student_width:
            if self.objective.against == STUDENT_PARAMETERS:
                raise InputError(
                    f"objective.against is {STUDENT_PARAMETERS}, but all students are of one size; give several in "
                    "space.student_width"
                )
            return
        if self.student.checkpoint:
            raise InputError(
                "space.student_width has several students, but student.checkpoint has the weights of one; remove one"
            )
        if BY_SIMILARITY in self.space.hints.pairings:
            raise InputError(
                f"space.hints.pairings has {BY_SIMILARITY!r}, which measures one student, but space.student_width has "
                "several; remove one"
            )

    @property
    def control_trials(self) -> int:
        """Control trials in total."""
        if not self.controls.arms:
            return 0
        return self.budget.trials if self.controls.trials is None else self.controls.trials

    def data_spec(self) -> DataSpec:
        """The data section as `distill` takes it."""
        meta_images = self.dynamic_weights.meta_images if self.dynamic_weights else 0
        return DataSpec(**self.data.model_dump(), seed=self.seed, meta_images=meta_images)

    def losses(self) -> tuple[str, ...]:
        """Every loss that the study names, each once."""
        loss = self.space.loss
        hints = [name for names in (*loss.hint, *loss.embedding) for name in names_together(names)]
        warmup = [self.warmup.loss] if self.warmup else []
        auxiliary = [self.teacher.taught_by.loss] if self.teacher.taught_by else []
        return tuple(dict.fromkeys([*loss.logit, *hints, *warmup, *auxiliary]))

    def own_code(self) -> dict[str, str]:
        """The user's own code that the study runs, by key."""
        named = {"teacher": self.teacher.model, "student": self.student.model, "data": self.data.name}
        if self.teacher.taught_by:
            named["teacher's teacher"] = self.teacher.taught_by.model
        own = {key: name for key, name in named.items() if is_own_code(name)}
        seen: list[str] = []
        for name in filter(is_own_code, self.losses()):
            function = name.rpartition(":")[2]
            # Two files may have a function of that name.
            own[f"loss {function} {seen.count(function) + 1}" if function in seen else f"loss {function}"] = name
            seen.append(function)
        return own

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
    space = content.get("space")
    if isinstance(space, dict):
        filled["space"] = _filled_space(space)
    teacher = content.get("teacher")
    if isinstance(teacher, dict):
        filled["teacher"] = _filled_teacher(teacher)
        if isinstance(teacher.get("taught_by"), dict):
            filled["teacher"]["taught_by"] = _filled_teacher(teacher["taught_by"])
    return filled


def _filled_teacher(teacher: dict[str, Any]) -> dict[str, Any]:
    """A copy of a network's section with the recipe, and the epochs, of the preset it names."""
    preset, recipe = _preset(teacher.get("recipe"), teacher)
    return dict(teacher) if preset is None else {**teacher, "recipe": {"epochs": preset.epochs, **recipe}}


def _filled_space(space: dict[str, Any]) -> dict[str, Any]:
    """The space with the losses and raw weights of the preset it names, whatever it says of them itself."""
    name = space.get("preset")
    if not isinstance(name, str) or name not in LOSS_PRESETS:
        return space
    preset = LOSS_PRESETS.get(name)
    parts: dict[str, dict[str, Any]] = {
        "loss": {"hint": [TOGETHER.join(loss for loss, _ in preset.hint)], "logit": [preset.logit]},
        "weight": {"by_loss": dict(preset.hint), "logit": preset.logit_weight, "classification": 1},
    }
    filled = {**space, "normalise": False, "temperature": preset.temperature}
    for key, part in parts.items():
        given = space.get(key, {})
        filled[key] = {**given, **part} if isinstance(given, dict) else given
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
        # Some name the key in full by themselves.
        return f"{key}: {reason}" if key and not reason.startswith(f"{key}.") else reason
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
