"""One trial: from a suggestion to a hint configuration on the driver, and its training on a worker."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from traceback import format_exc
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune

from ..analysis.hint_selection import HintSelection, select_control, select_hints
from ..analysis.layer_distances import LayerDistances
from ..analysis.layer_statistics import Matrix
from ..analysis.pairing import BY_DEPTH, pair_hints
from ..analysis.stability import with_stability
from ..distill.allocation import keep_freed_memory
from ..distill.data import DataSplits
from ..distill.dynamic_weights import DynamicWeights
from ..distill.execution import Execution
from ..distill.hint_configuration import HintConfiguration, HintPair
from ..distill.hint_terms import teacher_terms
from ..distill.recipe import Recipe
from ..distill.seeding import derived_seed
from ..distill.stepping import NonFiniteLossError
from ..distill.trainer import Seeds, Trainer
from ..distill.warmup import Warmup
from ..distill.weight_network import FEWEST_HINTS
from ..models.candidates import Candidate
from ..models.errors import InputError, reason
from ..models.files import FULL_DISK
from ..models.zoo import ModelSpec
from .collector import keep_what_there_is
from .epoch_reports import NO_ROOM, EpochReports
from .events import Suggested
from .networks import TrainedNetwork, as_tensors
from .study_types import STUDENT_PARAMETERS
from .suggestions import STUDENT_WIDTH, hint_weights

CHECKPOINT_FILE = "training.pt"


@dataclass(frozen=True)
class HintResolver:
    """Turns a suggestion into hint points and a hint configuration.

    Attributes:
        teacher: the teacher's candidates.
        student: the student's candidates.
        distances: the teacher's layer metrics.
        seed: of the study, for the random control.
        metric_weights: of layer metrics in a combination, 1 for one that is not in it.
        similarity: [teacher's candidates, student's candidates] for the pairing that reads it.
        normalise: whether hint terms are divided by their size at the start.
        warmup: of every configuration with hint points.
        dynamic_weights: of every configuration with at least two terms that read the teacher.
    """

    teacher: tuple[Candidate, ...]
    student: tuple[Candidate, ...]
    distances: LayerDistances
    seed: int
    metric_weights: Mapping[str, float] = field(default_factory=dict)
    similarity: Matrix | None = None
    normalise: bool = True
    warmup: Warmup | None = None
    dynamic_weights: DynamicWeights | None = None

    def resolve(
        self, number: int, control: str, parameters: Mapping[str, Any]
    ) -> tuple[HintConfiguration, HintSelection | None]:
        """The configuration of a trial, and the selection behind it (None if it has no hints).

        Raises:
            InputError: the parameters do not fit the networks.
        """
        selection = self._selection(number, control, parameters)
        hints = HintConfiguration(
            pairs=self._pairs(selection, parameters) if selection else (),
            classification_weight=parameters["weight.classification"],
            logit_weight=parameters["weight.logit"],
            logit_loss=parameters.get("loss.logit", "kd"),
            temperature=parameters.get("temperature", 4.0),
            embedding_weight=parameters.get("weight.embedding", 0.0),
            embedding_loss=parameters.get("loss.embedding", "pkt_symmetric"),
            normalise=self.normalise,
            warmup=self.warmup if selection else None,
        )
        if self.dynamic_weights and teacher_terms(hints) >= FEWEST_HINTS:
            hints = replace(hints, dynamic_weights=self.dynamic_weights)
        return hints, selection

    def _selection(self, number: int, control: str, parameters: Mapping[str, Any]) -> HintSelection | None:
        if "hints.selector" not in parameters:
            return None
        clusters, selector = parameters["hints.clusters"], parameters["hints.selector"]
        if not control:
            metrics = parameters["hints.metrics"].split(",")
            weights = {name: weight for name, weight in self.metric_weights.items() if name in metrics}
            return with_stability(
                self.distances, select_hints(self.distances, clusters, metrics, selector, weights or None)
            )
        rng = np.random.default_rng(derived_seed("control", self.seed, number))
        return select_control(self.teacher, clusters, selector, rng)

    def _pairs(self, selection: HintSelection, parameters: Mapping[str, Any]) -> tuple[HintPair, ...]:
        points = [self.teacher[index - 1] for index in selection.indices]
        weights = [(loss, parameters[name]) for name, loss in hint_weights(parameters["loss.hint"])]
        return tuple(
            HintPair(point.path, layer.path, loss, weight)
            for point, layer in pair_hints(
                selection.selector,
                points,
                len(self.teacher),
                self.student,
                parameters.get("hints.pairing", BY_DEPTH),
                self.similarity,
            )
            for loss, weight in weights
        )


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search share; a file that each machine has in memory once.

    Attributes:
        student: the network to train.
        teacher: the network to learn from.
        splits: training and validation images, never test.
        recipe: of the student, but for the learning rate.
        rungs: epochs at which a rung ends.
        start: weights that every student starts from; None: random ones.
        execution: where and how to compute; a trial that asked for no GPU must not use one, though since Ray 2.56 it
            sees them all.
        threads: torch's, from the trial's resources (Ray's own setting follows the CPU request only at start).
        checkpoint_seconds: least time between two checkpoints inside a rung.
        rankings: whether rankings are measured at the end of each rung.
    """

    student: ModelSpec
    teacher: TrainedNetwork
    splits: DataSplits
    recipe: Recipe
    rungs: tuple[int, ...]
    start: dict[str, NDArray[Any]] | None
    execution: Execution
    threads: int
    checkpoint_seconds: float
    rankings: bool = False


def tune_config(suggested: Suggested, checkpoint: str | None) -> dict[str, Any]:
    """What Tune hands to `run_trial` for a suggestion, new or issued again."""
    return {
        "number": suggested.number,
        "hints": suggested.hints,
        "lr": suggested.parameters["lr"],
        "data_seed": suggested.data_seed,
        "init_seed": suggested.init_seed,
        "width": suggested.parameters.get(STUDENT_WIDTH),
        "checkpoint": checkpoint,
    }


def run_trial(config: dict[str, Any], context: TrialContext) -> None:
    """Trains one student and reports its epochs to Tune; the function trainable.

    A loss that is not finite, a configuration that the networks refuse, or too little device memory even for halved
    batches is reported as `failure`: it fails the trial, not the search. A full disk is reported as `no_room`: it ends
    the search, and is no failure of the trial.
    """
    if not gc.get_freeze_count():
        # Once a process.
        keep_what_there_is()
    keep_freed_memory()
    torch.set_num_threads(context.threads)
    reports = EpochReports()
    try:
        _train(config, context, reports)
    except Exception as error:
        why = told(error)
        if why is None:
            reports.send()
            raise
        reports.fail(why)
    finally:
        # The actor's next trial starts with all of the device's memory.
        if context.execution.device == "cuda":
            torch.cuda.empty_cache()


def told(error: Exception) -> dict[str, Any] | None:
    """What a trial reports of an error that would come again; None: it is raised, and the trial retried.

    To be called where the error is handled.
    """
    if isinstance(error, NonFiniteLossError | InputError):
        return {"failure": str(error), "traceback": format_exc()}
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return {NO_ROOM: error.strerror or reason(error)}
    return None


class TrialTraining:
    """The training of a trial, or one worker's part in it.

    Args:
        config: of the trial, as `tune_config` makes it.
        context: what all trials share.
        execution: where and how it computes, and with which workers.
        checkpoint: folder that it goes on from; None: it starts anew.
    """

    def __init__(
        self, config: Mapping[str, Any], context: TrialContext, execution: Execution, checkpoint: Path | None
    ) -> None:
        hints = HintConfiguration.from_dict(config["hints"])
        student = context.student if config["width"] is None else replace(context.student, width=config["width"])
        self._context = context
        self._trainer = Trainer(
            student,
            context.splits,
            replace(context.recipe, lr=config["lr"]),
            context.rungs,
            Seeds(config["data_seed"], config["init_seed"]),
            hints=hints,
            teacher=context.teacher.as_teacher() if hints.needs_teacher else None,
            start=as_tensors(context.start) if context.start else None,
            execution=execution,
            rankings=context.rankings,
        )
        if checkpoint is not None:
            self._trainer.load_checkpoint(checkpoint / CHECKPOINT_FILE)
        self._saved = monotonic()

    def epochs(self) -> Iterator[dict[str, Any]]:
        """What is to be reported of each epoch."""
        for result in self._trainer.epochs():
            metrics = {"epoch": result.epoch, **result.metrics}
            # The driver adds them up.
            metrics["epoch_seconds"] = len(self._context.splits.train) / metrics["images_per_second"]
            metrics["epoch_seconds"] += metrics.get("warmup_seconds", 0.0)
            if result.epoch == 1:
                metrics[STUDENT_PARAMETERS] = sum(parameter.numel() for parameter in self._trainer.student.parameters())
                metrics |= {
                    f"normaliser_{i}": value
                    for i, value in enumerate(self._trainer.normalisers, start=1)
                    if value is not None
                }
            yield metrics

    @property
    def over(self) -> bool:
        """Whether the last epoch is done."""
        return self._trainer.epoch == self._context.rungs[-1]

    @property
    def checkpoint_due(self) -> bool:
        """Whether it is to be saved: at the end of each rung but the last, and now and then."""
        if self.over:
            return False
        return self._trainer.epoch in self._context.rungs or (
            monotonic() - self._saved >= self._context.checkpoint_seconds
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint into a folder."""
        self._trainer.save_checkpoint(folder / CHECKPOINT_FILE)
        self._saved = monotonic()


def _train(config: dict[str, Any], context: TrialContext, reports: EpochReports) -> None:
    checkpoint = last_checkpoint(config)
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        training = TrialTraining(config, context, context.execution, Path(folder) if folder else None)
    for metrics in training.epochs():
        reports.add(metrics)
        if training.checkpoint_due:
            with TemporaryDirectory() as folder:
                training.save(Path(folder))
                reports.send(checkpoint=tune.Checkpoint.from_directory(folder))
        elif training.over or reports.due:
            reports.send()


def last_checkpoint(config: dict[str, Any]) -> tune.Checkpoint | None:
    """Where the trial goes on: after a failure in this launch Tune knows it, else as the journal had it."""
    last: tune.Checkpoint | None = tune.get_checkpoint()
    if last is None and config["checkpoint"]:
        last = tune.Checkpoint(config["checkpoint"])
    return last
