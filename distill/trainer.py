"""Training networks epoch by epoch, with or without a teacher: one, or several on one stream of teacher outputs."""

import pickle
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.penultimate import classifier_path
from ..models.preprocessing import Preprocessing
from ..models.zoo import ModelSpec, build_model
from .batches import Batches
from .data import DataSplits
from .device_memory import Halving, memory_errors_told
from .evaluation import evaluate
from .execution import Execution
from .group_warmup import WarmupSetting, warm_up
from .hint_configuration import HintConfiguration
from .hint_weighting import HintWeighting
from .hinted_student import Labelling
from .lazy_images import LazyImages
from .opening import open_batches
from .recipe import Recipe
from .retrieval import retrieval
from .seeding import derived_seed
from .side_by_side import at_once
from .stepping import MAIN, Given, NonFiniteLossError, Stepping, own_generators, seed_layers
from .student_training import TERMS, StudentTraining
from .teacher_pass import TeacherOutputs, TeacherPass
from .worker_limits import check_shared_training

NORMALISER_BATCHES = 8
CHECKPOINT_VERSION = 4
# Without gradients, by their names in a checkpoint and in an error.
PASSES = {"teacher": "the teacher", "validation": "the validation", "rankings": "the rankings"}


@dataclass(frozen=True)
class Seeds:
    """Where the randomness of a training comes from.

    Attributes:
        data_seed: order of the images and their augmentation.
        init_seed: initial weights of student and adapters.
    """

    data_seed: int = 0
    init_seed: int = 0


@dataclass(frozen=True)
class TaughtStudent:
    """What tells one student of a group from the others.

    Attributes:
        hints: what it learns from the teacher.
        init_seed: of the initial weights of student and adapters.
    """

    hints: HintConfiguration
    init_seed: int


@dataclass(frozen=True)
class TeacherNetwork:
    """A teacher as a trainer takes it.

    Attributes:
        network: with its weights; it is copied, and left as it is.
        preprocessing: what it takes; None: the data set's own.
    """

    network: nn.Module
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True)
class EpochResult:
    """One epoch's figures.

    Attributes:
        epoch: 1-based.
        metrics: `val_accuracy` and `val_macro_f1` (0..1), `val_loss`, `train_loss`, `loss_classification`,
            `loss_logit`, `loss_hint` (normalised, summed over the terms, without weight), `lr` at the epoch's start,
            `images_per_second`; at a rung's end `val_map_cosine` and the like if rankings are wanted; in epoch 1 after
            a warm-up `warmup_seconds` and, of each layer's last epoch by depth, `warmup_loss_1`, ...; in epoch 1 also
            `adapter_parameters`, the number of values that hint losses train beside the student, if they do. Once the
            device's memory has run out: `accumulation_steps`, 2 if a step adds up the gradients of two halves of its
            batch, and `halved_passes`, how many of teacher, validation and rankings, whose results it changes by
            rounding alone, take half as many images at a time.
    """

    epoch: int
    metrics: dict[str, float]


class GroupTrainer:
    """Trains several students at once: each batch is made, and the teacher runs on it, once for all.

    Each student is trained exactly as it would be alone with the same data_seed; to rounding only, if the hint point
    of another lies between a convolution and its batch norm, for these two are then folded for none.

    A student that runs out of device memory goes on in halves, see `StudentTraining`; the others go on as they were.

    Args:
        student: the network that each of them is.
        splits: training and validation images.
        recipe: optimizer, schedule and augmentation.
        rungs: epochs at which a complete annealed schedule ends, increasing; the last one ends the training.
        students: what tells them apart; at least one.
        data_seed: order and augmentation of the images, for all.
        teacher: needed if one of them reads it.
        start: weights that all of them start from; None: random ones.
        execution: where and how the arithmetic is done.
        rankings: whether it is measured, at the end of each rung, how well the penultimate features of validation
            images find training images of their class.
        side_by_side: the most students that are trained at the same time on a CPU, each with as many torch threads as
            the caller has; students whose layers or losses draw random numbers, as dropout does, are trained one by
            one, for they share torch's generator.

    Raises:
        InputError: a hint configuration that does not fit the two networks, weights that do not fit.
    """

    @memory_errors_told("the start of the training")
    def __init__(
        self,
        student: ModelSpec,
        splits: DataSplits,
        recipe: Recipe,
        rungs: tuple[int, ...],
        students: Sequence[TaughtStudent],
        data_seed: int,
        *,
        teacher: TeacherNetwork | None = None,
        start: Mapping[str, Tensor] | None = None,
        execution: Execution | None = None,
        rankings: bool = False,
        side_by_side: int = 1,
    ) -> None:
        self.rungs, self.epoch = rungs, 0
        self._warmed_up: list[dict[str, float]] = [{} for _ in students]
        self._recipe, self._data_seed = recipe, data_seed
        self._execution = execution or Execution()
        device, workers = self._execution.place, self._execution.workers
        unreadable = splits.train.unreadable.limit if isinstance(splits.train, LazyImages) else 0
        check_shared_training(workers.size, self._execution.device, recipe, unreadable, len(students))
        self._passes = {
            name: Halving(f"the pass of {of}", device, possible=workers.alone) for name, of in PASSES.items()
        }
        self._at_once = 1
        if device.type == "cpu" and min(side_by_side, len(students)) > 1:
            drawing = _draws_random_numbers(student, student.input_shape(splits.image_shape))
            self._at_once = 1 if drawing else min(side_by_side, len(students))
        ours = student.preprocessing or splits.preprocessing
        theirs = (teacher.preprocessing if teacher else None) or splits.preprocessing
        self._train = open_batches(splits.train, ours, device, theirs)
        self._validation = open_batches(splits.validation, ours, device)
        self._meta: Batches | None = None
        channels, *size = splits.image_shape
        height, width = theirs.size or size
        taught_shape = self._taught_shape = (channels, height, width)
        self._student_shape = student.input_shape(splits.image_shape)
        labelling = Labelling(recipe.label_smoothing, _class_weights(recipe, splits))
        labels = self._labels = torch.from_numpy(splits.train.labels)
        network = self._network = teacher.network if teacher else None
        self._trainings: list[StudentTraining] = []
        self._teacher: TeacherPass | None = None
        try:
            for one in students:
                self._trainings.append(
                    StudentTraining(
                        student,
                        start,
                        one.hints,
                        one.init_seed,
                        network,
                        splits.image_shape,
                        taught_shape,
                        recipe,
                        labelling,
                        self._execution,
                        labels,
                    )
                )
            if any(training.draws for training in self._trainings):
                self._at_once = 1
            init_seeds = [one.init_seed for one in students]
            self._stepping = Stepping(self._train, recipe, data_seed, init_seeds, self._at_once, workers)
            self._classifier = classifier_path(self._trainings[0].network, self._student_shape) if rankings else None
            # After the students, whose losses may read parameters that folding changes.
            layers = [layer for training in self._trainings for layer in training.whole.teacher_layers]
            logits = any(one.hints.logit_weight > 0 for one in students)
            # A warm-up has a pass of its own, so the main stage may read nothing.
            if network is not None and (layers or logits):
                self._teacher = TeacherPass(
                    network, layers, logits, taught_shape, self._execution, self._at_once, self._passes["teacher"]
                )
            self._set_normalisers()
            self._weigh(splits, ours)
            # A warm-up has taps of its own on the student, so that one waits for its end.
            for training in self._trainings:
                if not training.whole.hints.curriculum:
                    training.compile()
        except BaseException:
            self.close()
            raise

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that are validated and exported, one a student."""
        return tuple(training.network for training in self._trainings)

    @property
    def normalisers(self) -> tuple[tuple[float | None, ...], ...]:
        """For each student one constant a hint pair, by which its loss is divided; None: the pair is left out."""
        return tuple(training.whole.pair_normalisers for training in self._trainings)

    def epochs(self) -> Iterator[tuple[EpochResult, ...]]:
        """Trains on from the present epoch to the last; takes the taps off the networks at the end.

        Yields:
            One result a student.

        Raises:
            NonFiniteLossError: at the end of the first epoch with a step whose loss is not finite.
            OutOfDeviceMemoryError: the device's memory ran out where a batch was in halves already, or where nothing
                can be halved.
        """
        try:
            with memory_errors_told("the training"):
                if self.epoch == 0:
                    self._warm_up()
                for training in self._trainings:
                    if training.whole.hints.curriculum:
                        training.compile()
                while self.epoch < self.rungs[-1]:
                    yield self._run_epoch()
        finally:
            self.close()

    def save_checkpoint(self, path: Path) -> None:
        """Writes all that a later `load_checkpoint` needs to go on exactly as if never interrupted."""
        content = {
            "version": CHECKPOINT_VERSION,
            "epoch": self.epoch,
            "students": [training.state_dict() for training in self._trainings],
            "halved": {name: halving.halved for name, halving in self._passes.items()},
        }
        # Not by torch's own writer, which tells of a full disk as an unexpected position.
        written = BytesIO()
        torch.save(content, written)
        with replacing(path) as temporary:
            temporary.write_bytes(written.getbuffer())

    def load_checkpoint(self, path: Path) -> None:
        """Goes back to the end of the epoch at which `save_checkpoint` was called; the arguments must be the same.

        Raises:
            InputError: the file is damaged, of another version, or of another number of students.
        """
        try:
            # On the CPU: what is loaded is copied, and a device might have no room for it twice.
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            version = content["version"]
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{path} cannot be read as a checkpoint ({reason(error)}); start the training anew"
            ) from error
        if version != CHECKPOINT_VERSION:
            raise InputError(
                f"{path} has version {version}, but must have {CHECKPOINT_VERSION}; start the training anew"
            )
        if len(content["students"]) != len(self._trainings):
            raise InputError(
                f"{path} holds {len(content['students'])} students, but there are {len(self._trainings)} here; give as "
                "many as were saved, or start the training anew"
            )
        for training, state in zip(self._trainings, content["students"], strict=True):
            training.load_state_dict(state)
        for name, halving in self._passes.items():
            halving.halved = content["halved"][name]
        self.epoch = content["epoch"]

    def close(self) -> None:
        """Takes the taps off the students, and ends what reads images."""
        for training in self._trainings:
            training.close()
        for batches in (self._train, self._validation, self._meta):
            if batches is not None:
                batches.close()

    def _weigh(self, splits: DataSplits, takes: Preprocessing) -> None:
        """Gives the students with dynamic weights what learns them."""
        weighed = [training for training in self._trainings if training.whole.hints.dynamic_weights]
        if not weighed:
            return
        if splits.meta is None:
            raise InputError("dynamic weights need images set aside to learn on; give data.meta_images")
        self._meta = open_batches(splits.meta, takes, self._execution.place)
        for training in weighed:
            settings = training.whole.hints.dynamic_weights
            assert settings is not None
            seed = derived_seed("weighting", self._data_seed, training.init_seed)
            training.weigh_by(
                HintWeighting(training.whole, settings, len(splits.train), self._meta, self.rungs[0], seed)
            )

    def _set_normalisers(self) -> None:
        workers = self._execution.workers
        batches = self._train.fixed_batches(NORMALISER_BATCHES, self._recipe.batch_size, self._data_seed, workers)
        taught: Iterable[TeacherOutputs] = (self._teacher(batch.teacher_images) for batch in batches if self._teacher)
        if len(self._trainings) > 1:
            # Else it is not kept: of eight batches it may take more memory than a step.
            taught = list(taught)
        for training in self._trainings:
            with own_generators(self._execution.place):
                seed_layers(self._execution.place, "normalisers", self._data_seed, training.init_seed)
                training.set_normalisers(batches, taught)

    def _run_epoch(self) -> tuple[EpochResult, ...]:
        epoch = self.epoch + 1
        started = time.perf_counter()
        # [students, steps, terms]; `cpu` waits for the device, so the time is taken after it.
        trained = self._train_epoch(epoch)
        self._execution.workers.add([trained])
        history = trained.cpu()
        seconds = time.perf_counter() - started
        self._check_finite(history, epoch)
        self.epoch = epoch
        figures = history.double().mean(dim=1).tolist()
        lr = self._recipe.learning_rate(self.rungs, epoch - 1)
        speed = {"lr": lr, "images_per_second": len(self._train) / seconds}
        found = self._validate()
        own = [self._own_metrics(number, epoch) for number in range(len(found))]
        return tuple(
            EpochResult(epoch, {**validated, **dict(zip(TERMS, terms, strict=True)), **speed, **further})
            for validated, terms, further in zip(found, figures, own, strict=True)
        )

    def _own_metrics(self, number: int, epoch: int) -> dict[str, float]:
        """What only some students have in some epochs: figures of the warm-up, of weights, of rankings, of memory."""
        training = self._trainings[number]
        metrics = training.epoch_metrics()
        if epoch == 1:
            metrics |= self._warmed_up[number] | training.adapter_metrics()
        if self._classifier is not None and epoch in self.rungs:
            found = retrieval(
                training.network,
                self._classifier,
                self._train,
                self._validation,
                self._recipe.batch_size * 4,
                self._execution,
                halving=self._passes["rankings"],
            )
            metrics |= {f"val_{name}": value for name, value in found.items()}
        halved = sum(halving.halved for halving in self._passes.values())
        return metrics | {"halved_passes": float(halved)} if halved else metrics

    def _warm_up(self) -> None:
        if self._network is not None and any(training.whole.hints.curriculum for training in self._trainings):
            setting = WarmupSetting(
                self._network,
                self._student_shape,
                self._taught_shape,
                self._recipe,
                self._execution,
                self._labels,
                self._at_once,
                self._passes["teacher"],
            )
            self._warmed_up = warm_up(self._trainings, setting, self._stepping)

    def _train_epoch(self, epoch: int) -> Tensor:
        """The terms of each step, [students, steps, 4] on the device: nothing waits for it before the epoch's end."""
        steps = self._stepping.steps
        for training in self._trainings:
            training.begin_epoch(epoch)

        def lr_of(step: int) -> float:
            return self._recipe.learning_rate(self.rungs, epoch - 1 + step / steps)

        rows = self._stepping.epoch(
            MAIN, epoch, self._teacher, lr_of, [partial(_step, training) for training in self._trainings]
        )
        for training in self._trainings:
            training.end_epoch()
        return torch.stack([torch.stack(row) for row in rows])

    def _check_finite(self, history: Tensor, epoch: int) -> None:
        broken = ~torch.isfinite(history).all(dim=2)
        if not broken.any():
            return
        step = int(broken.any(dim=0).nonzero()[0])
        which = int(broken[:, step].nonzero()[0])
        total, classification, logit, hint = history[which, step].tolist()
        steps = history.shape[1]
        lr = self._recipe.learning_rate(self.rungs, epoch - 1 + step / steps)
        of = f" of the student with init_seed {self._trainings[which].init_seed}" if len(self._trainings) > 1 else ""
        raise NonFiniteLossError(
            f"the loss{of} is {total:.4g} in step {step + 1} of {steps} of epoch {epoch} (classification "
            f"{classification:.4g}, logit {logit:.4g}, hint {hint:.4g}) at a learning rate of {lr:.4g}; lower lr or "
            "the weights, or set recipe.clip_norm"
        )

    def _validate(self) -> list[dict[str, float]]:
        """The validation figures of each student."""

        def validate(network: nn.Module) -> dict[str, float]:
            found = evaluate(
                network,
                self._validation,
                self._recipe.batch_size * 4,
                self._execution,
                halving=self._passes["validation"],
            )
            return {f"val_{name}": value for name, value in found.items()}

        return at_once(validate, self.networks, self._at_once)


class Trainer:
    """Trains one network and yields its figures epoch by epoch; `GroupTrainer` with one student.

    Args:
        student: what to train.
        splits: training and validation images.
        recipe: optimizer, schedule and augmentation.
        rungs: epochs at which a complete annealed schedule ends, increasing; the last one ends the training.
        seeds: of data order and initialisation.
        hints: what the student learns from the teacher; None: labels only.
        teacher: needed if the hints read it.
        start: weights that it starts from; None: random ones.
        execution: where and how the arithmetic is done.
        rankings: see `GroupTrainer`.

    Raises:
        InputError: a hint configuration that does not fit the two networks, weights that do not fit.
    """

    def __init__(
        self,
        student: ModelSpec,
        splits: DataSplits,
        recipe: Recipe,
        rungs: tuple[int, ...],
        seeds: Seeds,
        *,
        hints: HintConfiguration | None = None,
        teacher: TeacherNetwork | None = None,
        start: Mapping[str, Tensor] | None = None,
        execution: Execution | None = None,
        rankings: bool = False,
    ) -> None:
        students = [TaughtStudent(hints or HintConfiguration(), seeds.init_seed)]
        self._group = GroupTrainer(
            student,
            splits,
            recipe,
            rungs,
            students,
            seeds.data_seed,
            teacher=teacher,
            start=start,
            execution=execution,
            rankings=rankings,
        )

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs at which a complete annealed schedule ends."""
        return self._group.rungs

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._group.epoch

    @property
    def student(self) -> nn.Module:
        """The network that is validated and exported."""
        return self._group.networks[0]

    @property
    def normalisers(self) -> tuple[float | None, ...]:
        """One constant a hint pair, by which its loss is divided; None: the pair is left out."""
        return self._group.normalisers[0]

    def epochs(self) -> Iterator[EpochResult]:
        """Trains on from the present epoch to the last; see `GroupTrainer.epochs`."""
        for (result,) in self._group.epochs():
            yield result

    def save_checkpoint(self, path: Path) -> None:
        """Writes all that a later `load_checkpoint` needs to go on exactly as if never interrupted."""
        self._group.save_checkpoint(path)

    def load_checkpoint(self, path: Path) -> None:
        """Goes back to the end of the epoch at which `save_checkpoint` was called; the arguments must be the same.

        Raises:
            InputError: the file is damaged, or of another version.
        """
        self._group.load_checkpoint(path)


def _step(training: StudentTraining, given: Given) -> Tensor:
    return training.step(given.batch, given.taught, given.lr)


def _class_weights(recipe: Recipe, splits: DataSplits) -> tuple[float, ...] | None:
    """Each class's n/(classes·its images), which is 1 where all have as many; as scikit-learn's `balanced`."""
    if recipe.class_weights == "none":
        return None
    labels = torch.from_numpy(splits.train.labels)
    counts = torch.bincount(labels, minlength=splits.classes)
    return tuple((len(labels) / (splits.classes * counts.double())).tolist())


def _draws_random_numbers(spec: ModelSpec, image_shape: tuple[int, int, int]) -> bool:
    """Whether a network in training mode reads torch's global generator."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = build_model(spec).train()
        before = torch.get_rng_state()
        network(torch.zeros(2, *image_shape))
        return not torch.equal(torch.get_rng_state(), before)
