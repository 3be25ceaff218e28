"""Training one network on the cluster outside of Tune: the teacher, or the student that layers are compared with."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
from numpy.typing import NDArray

from ..distill.allocation import keep_freed_memory
from ..distill.data import DataSplits
from ..distill.hint_configuration import HintConfiguration
from ..distill.recipe import Recipe
from ..distill.trainer import EpochResult, Seeds, Trainer
from ..models.errors import InputError
from ..models.weights import StateDict
from ..models.zoo import ModelSpec
from .hardware import local_execution
from .networks import TrainedNetwork
from .study_sections import ResourcesSection

CHECKPOINT_SECONDS = 60.0

OnEpoch = Callable[[EpochResult, int], None]


@dataclass(frozen=True)
class TrainingReport:
    """Where a training reports to.

    Attributes:
        on_epoch: takes each epoch's figures and the number of epochs.
        on_precision: takes the precision in which the worker computes, and why.
    """

    on_epoch: OnEpoch
    on_precision: Callable[[str, str], None]


@dataclass(frozen=True)
class TrainingTask:
    """What to train.

    Attributes:
        spec: the network.
        recipe: how.
        rungs: epochs at which a complete schedule ends.
        seeds: of data and weights.
        hints: what it learns from a teacher.
        teacher: that teacher; None if the hints need none.
        start: weights that it starts from; None: random ones.
        checkpoint: file from which an interrupted training goes on; None: it starts anew. Where the worker does not see
            the file of an earlier one it starts anew, too.
    """

    spec: ModelSpec
    recipe: Recipe
    rungs: tuple[int, ...]
    seeds: Seeds
    hints: HintConfiguration | None = None
    teacher: TrainedNetwork | None = None
    start: StateDict | None = None
    checkpoint: Path | None = None


def train_on_cluster(
    task: TrainingTask, splits: DataSplits, resources: ResourcesSection, report: TrainingReport | None = None
) -> StateDict:
    """Trains a network as one Ray task with the resources of a trial; Ray must be running.

    Args:
        task: what to train.
        splits: training and validation images.
        resources: of a study.
        report: where it reports to.

    Returns:
        Its weights after the last epoch.
    """
    # Asked for even where there is none yet: a cluster that scales from zero starts a worker for it.
    gpus = 1.0 if resources.gpus_per_trial else min(1.0, float(ray.cluster_resources().get("GPU", 0)))
    cpus = resources.cpus_per_worker
    on_gpu = gpus > 0 and resources.device != "cpu"
    # Typed Any: Ray's types know no streaming generators.
    remote: Any = ray.remote(_train).options(num_cpus=cpus, num_gpus=gpus, num_returns="streaming")
    weights: StateDict = {}
    for reference in remote.remote(ray.put(task), ray.put(splits), resources, on_gpu):
        item = ray.get(reference)
        if isinstance(item, EpochResult):
            if report:
                report.on_epoch(item, task.rungs[-1])
        elif isinstance(item, tuple):
            if report:
                report.on_precision(*item)
        elif item is not None:
            weights = {name: torch.from_numpy(array.copy()) for name, array in item.items()}
    return weights


def _train(
    task: TrainingTask, splits: DataSplits, resources: ResourcesSection, on_gpu: bool
) -> Iterator[tuple[str, str] | EpochResult | dict[str, NDArray[Any]] | None]:
    """Yields the precision, each epoch (None: it was trained before an interrupt), and the weights.

    As many items whether it goes on or not: Ray counts them where it begins a task again whose node has died.
    """
    keep_freed_memory()
    torch.set_num_threads(resources.cpus_per_worker)
    execution, why = local_execution(resources, on_gpu)
    yield execution.precision, why
    trainer = Trainer(
        task.spec,
        splits,
        task.recipe,
        task.rungs,
        task.seeds,
        hints=task.hints,
        teacher=task.teacher.as_teacher() if task.teacher else None,
        start=task.start,
        execution=execution,
    )
    if task.checkpoint:
        # One that is damaged, or of another version, is as good as none.
        with suppress(InputError):
            trainer.load_checkpoint(task.checkpoint)
        yield from [None] * trainer.epoch
    saved = monotonic()
    for result in trainer.epochs():
        if task.checkpoint and monotonic() - saved >= CHECKPOINT_SECONDS and result.epoch < task.rungs[-1]:
            # Without room for it the training goes on all the same.
            with suppress(OSError):
                trainer.save_checkpoint(task.checkpoint)
            saved = monotonic()
        yield result
    yield {name: tensor.cpu().numpy() for name, tensor in trainer.student.state_dict().items()}
