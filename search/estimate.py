"""What a search will cost, from some steps of training on this machine; they also run the user's own losses once."""

import os
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..analysis.hint_selection import select_control
from ..analysis.pairing import pair_by_depth
from ..distill.data import DataSplits
from ..distill.hint_configuration import HintConfiguration, HintPair
from ..distill.loss_names import names_together
from ..distill.splits import Split
from ..distill.threads import torch_threads
from ..distill.trainer import Seeds, TeacherNetwork, Trainer
from ..models.errors import InputError, reason
from ..models.own_code import is_own_code, own_code_path
from ..models.zoo import build_model
from .hardware import local_execution
from .plan import most_repeats, plan_trials
from .preflight import Checked
from .specs import student_spec, teacher_spec
from .study import Study

ESTIMATE_EPOCHS = 2
# An estimate starts with few images, and takes more until it has trained for so long.
FEWEST_TIMED, MORE, TIMED_SECONDS = 32, 4, 0.75


@dataclass(frozen=True)
class Estimate:
    """What a search will cost at most, measured on a few steps of the largest kind of trial.

    Attributes:
        trials: control and search trials, and what is confirmed.
        epoch_seconds: of one student epoch with a hint loss and the teacher's forward pass, all images.
        training_seconds: of all trials one after the other, none of them stopped early.
        wall_seconds: with as many at once as fit on this machine.
        teacher_cached: whether the teacher is there already.
        warmup_epochs: of the longest warm-up, before the epochs of the main stage.
    """

    trials: int
    epoch_seconds: float
    training_seconds: float
    wall_seconds: float
    teacher_cached: bool
    warmup_epochs: int = 0


def estimate(study: Study, checked: Checked) -> Estimate:
    """Trains a control's hint configuration on some images for some seconds, the teacher untrained, and extrapolates.

    Before that each of the study's own losses is used on a few images. Without torch.compile: what it takes at the
    start of each trial is no matter of epochs.

    Raises:
        InputError: the user's own code raises; says where.
    """
    loss, shapes = study.space.loss, checked.shapes
    trials = len(plan_trials(study)) + most_repeats(study)
    for name in (name for names in loss.hint for name in names_together(names) if is_own_code(name)):
        _train(study, checked, _hints(study, checked, name, loss.logit[0]), FEWEST_TIMED)
    for name in filter(is_own_code, loss.logit):
        _train(study, checked, _hints(study, checked, loss.hint[0], name), FEWEST_TIMED)
    epoch_seconds = _epoch_seconds(study, checked)
    most = max(shapes.stages, min(study.space.hints.clusters.high, len(shapes.teacher)))
    warmup_epochs = study.warmup.warmup().total_epochs(most) if study.warmup else 0
    training_seconds = epoch_seconds * (study.budget.rungs[-1] + warmup_epochs) * trials
    at_once = min(study.resources.concurrent_trials or trials, _local_trials(study))
    wall_seconds = training_seconds / at_once
    return Estimate(trials, epoch_seconds, training_seconds, wall_seconds, checked.teacher_ready, warmup_epochs)


def _hints(study: Study, checked: Checked, hint_losses: str, logit_loss: str) -> HintConfiguration:
    """Of a control at the stage ends, with all that costs time in it."""
    shapes = checked.shapes
    points = select_control(shapes.teacher, shapes.stages, "stage_ends", np.random.default_rng(0))
    chosen = [shapes.teacher[index - 1] for index in points.indices]
    pairs = pair_by_depth(chosen, len(shapes.teacher), shapes.student)
    return HintConfiguration(
        tuple(
            HintPair(point.path, layer.path, loss, 1.0)
            for point, layer in pairs
            for loss in names_together(hint_losses)
        ),
        logit_weight=1.0,
        logit_loss=logit_loss,
        dynamic_weights=study.dynamic_weights.dynamic_weights() if study.dynamic_weights else None,
    )


def _epoch_seconds(study: Study, checked: Checked) -> float:
    """Of all images, from as many as are trained on in some seconds."""
    hints = _hints(study, checked, study.space.loss.hint[0], study.space.loss.logit[0])
    images, every = FEWEST_TIMED, len(checked.splits.train)
    while True:
        seconds = _train(study, checked, hints, images)
        if seconds >= TIMED_SECONDS or images >= every:
            return seconds / ESTIMATE_EPOCHS / min(1.0, images / every)
        images *= MORE


def _train(study: Study, checked: Checked, hints: HintConfiguration, images: int) -> float:
    """Seconds of some epochs of so many images."""
    splits = _part(checked.splits, min(1.0, images / len(checked.splits.train)))
    spec, recipe = teacher_spec(study, splits), study.recipe.recipe(lr=1e-4)
    try:
        with torch_threads(study.resources.cpus):
            trainer = Trainer(
                student_spec(study, splits),
                splits,
                # Of few images a class may have none, and no weight.
                replace(recipe, batch_size=min(recipe.batch_size, len(splits.train)), class_weights="none"),
                (ESTIMATE_EPOCHS,),
                Seeds(),
                hints=hints,
                teacher=TeacherNetwork(build_model(spec), spec.preprocessing),
                execution=replace(local_execution(study.resources, on_gpu=False)[0], compile="off"),
            )
            started = time.perf_counter()
            for _ in trainer.epochs():
                pass
            return time.perf_counter() - started
    except InputError:
        raise
    except Exception as error:
        # Of anything else than the user's own code the traceback is wanted.
        where = _own_line(study, error)
        if where is None:
            raise
        raise InputError(
            f"{where} raises {type(error).__name__} ({reason(error)}); mend it before the search"
        ) from error


def _own_line(study: Study, error: Exception) -> str | None:
    """The last place in the study's own code that an error went through."""
    files = [path.resolve() for path in map(own_code_path, study.own_code().values()) if path is not None]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve() in files:
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return None


def _part(splits: DataSplits, share: float) -> DataSplits:
    return replace(splits, train=_share(splits.train, share), validation=_share(splits.validation, share))


def _share(split: Split, share: float) -> Split:
    """Images from all of a split, which may be sorted by class."""
    count = max(1, round(share * len(split)))
    return split.subset(np.arange(count) * len(split) // count)


def _local_trials(study: Study) -> int:
    return max(1, (os.cpu_count() or 1) // study.resources.cpus)
