"""One student in training: its loss, its optimizer, the moving average of its weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.weights import apply_weights
from ..models.zoo import ModelSpec, build_model
from .batches import Batch
from .device_memory import Halving
from .execution import Execution
from .hint_configuration import HintConfiguration
from .hint_weighting import HintWeighting
from .hinted_student import HintedStudent, Labelling, LossTerms
from .loss_names import find_hint_loss
from .moving_average import MovingAverage
from .optimizers import descend, make_optimizer
from .parts import Part
from .recipe import Recipe
from .repeatable_step import RepeatableStep
from .teacher_pass import TeacherOutputs

_BATCH_NORM = nn.modules.batchnorm._NormBase
# Columns of what a step returns.
TERMS = ("train_loss", "loss_classification", "loss_logit", "loss_hint")


class StudentTraining:
    """Everything of one student that a step changes.

    A batch that runs out of device memory, and from then on every batch, is computed as two halves whose gradients are
    added up for one step of the optimizer. That is the gradient of the whole batch, but for what couples its images:
    batch norm uses the statistics of a half, and losses that compare images with each other compare those of a half.

    Attributes:
        halving: whether it is so; the warm-up's batches, too.

    Args:
        spec: the network, freshly initialised from `init_seed` or from `weights`.
        weights: to start from; None: random ones.
        hints: what it learns from the teacher.
        init_seed: of the initial weights of student and adapters.
        teacher: the network that is taught from; None if the hints read none.
        image_shape: (channels, height, width) of one image of the data.
        teacher_shape: the same as the teacher takes it.
        recipe: optimizer and regularisation.
        labelling: how labels become a loss.
        execution: where and how it runs.
        labels: int64 [N] of all training images.

    Raises:
        InputError: a hint configuration that does not fit the two networks, weights that do not fit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor] | None,
        hints: HintConfiguration,
        init_seed: int,
        teacher: nn.Module | None,
        image_shape: tuple[int, int, int],
        teacher_shape: tuple[int, int, int],
        recipe: Recipe,
        labelling: Labelling,
        execution: Execution,
        labels: Tensor,
    ) -> None:
        self.init_seed = init_seed
        # Batch norm in training needs two images a half.
        workers = execution.workers
        self.halving = Halving("the training", execution.place, fewest=2, possible=workers.alone)
        with torch.random.fork_rng():
            # The student first: its initial weights are then the same whatever adapters follow.
            torch.manual_seed(init_seed)
            network = build_model(spec)
            if weights is not None:
                apply_weights(network, dict(weights), f"the start of {spec.name}")
            if recipe.batch_norm == "batch" and not workers.alone:
                network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
            # Before the taps, of which it must have no copy.
            self._average = MovingAverage(network, recipe.ema_decay) if recipe.ema_decay else None
            whole = HintedStudent(
                network,
                hints,
                teacher,
                spec.input_shape(image_shape),
                teacher_shape,
                labelling,
                execution,
                labels,
                recipe.batch_norm == "frozen",
            )
        self.whole = whole.to(execution.place).to(memory_format=torch.channels_last)
        if self._average is not None:
            self._average.network.to(execution.place).to(memory_format=torch.channels_last)
        # The very same at the start, whatever hardware a worker drew them on.
        workers.agree(self.whole.state_dict().values())
        self._repeatable = RepeatableStep(self.whole, self.halving)
        self._weighting: HintWeighting | None = None
        self._clip_norm = recipe.clip_norm
        self._optimizer = make_optimizer(recipe, self.whole.parameters())
        self._compile = execution.compile

    @property
    def network(self) -> nn.Module:
        """What is validated and exported: the student, or the moving average of its weights."""
        return self.whole.student if self._average is None else self._average.network

    def compile(self) -> None:
        """Compiles the student if the execution says so; an eager pass has to come first, for what its taps check."""
        if self._compile != "off":
            self.whole.student.compile(mode=None if self._compile == "default" else self._compile)

    @property
    def draws(self) -> bool:
        """Whether a loss, the warm-up's included, reads torch's global generator."""
        warmup = self.whole.hints.warmup if self.whole.hints.curriculum else None
        return self.whole.draws or (warmup is not None and find_hint_loss(warmup.loss).draws)

    def weigh_by(self, weighting: HintWeighting) -> None:
        """From now on the distillation terms have weights for each image."""
        self._weighting = weighting

    def begin_epoch(self, epoch: int) -> None:
        """Gets ready for an epoch of the main stage, from 1."""
        self.whole.train()
        if self._weighting is not None:
            self._weighting.begin_epoch(epoch)

    def end_epoch(self) -> None:
        """Gives the batch norms of all workers the mean of their running statistics."""
        networks = [self.whole] if self._average is None else [self.whole, self._average.network]
        norms = [module for network in networks for module in network.modules() if isinstance(module, _BATCH_NORM)]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        self.whole.execution.workers.average(statistics)

    def epoch_metrics(self) -> dict[str, float]:
        """What the last epoch has to tell beside the terms; `accumulation_steps` if batches are in halves."""
        halved = {"accumulation_steps": float(self.halving.parts)} if self.halving.halved else {}
        return halved if self._weighting is None else halved | self._weighting.metrics()

    def adapter_metrics(self) -> dict[str, float]:
        """`adapter_parameters`, how many values hint losses train beside the student; empty without hint terms."""
        terms = self.whole.hint_terms
        counts = [parameter.numel() for term in terms for parameter in term.parameters()]
        return {"adapter_parameters": float(sum(counts))} if terms else {}

    def begin_main_stage(self) -> None:
        """After a warm-up: what follows the weights begins with those of now."""
        if self._average is not None:
            self._average.begin_with(self.whole.student)

    def step(self, batch: Batch, taught: TeacherOutputs | None, lr: float) -> Tensor:
        """One step of the optimizer.

        Returns:
            `TERMS` [4] of the batch before the step, on the device, so that nothing waits for it.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        undo = None if self._weighting is None else self._weighting.undo
        figures = self._repeatable.run(batch, taught, partial(self._descend, lr), self._optimizer, undo)
        # From here on the step is taken, and cannot be repeated.
        if self._average is not None:
            self._average.follow(self.whole.student)
        self._repeatable.keep()
        if self._weighting is not None:
            self._weighting.keep()
        return figures

    def set_normalisers(self, batches: Sequence[Batch], taught: Iterable[TeacherOutputs]) -> None:
        """Sets the normalisers of the hint terms; see `HintedStudent.set_normalisers`."""

        def hints_of(batch: Batch, taught: TeacherOutputs) -> Tensor:
            found = self._repeatable.run(batch, taught, self._hints)
            self._repeatable.keep()
            return found

        self.whole.set_normalisers(batches, taught, hints_of)

    def _descend(self, lr: float, parts: list[Part]) -> Tensor:
        """One step of the optimizer; the figures of `step`."""
        figures: list[Tensor] = []

        def losses() -> Iterator[Tensor]:
            for part in parts:
                total, terms = self._loss(part, lr)
                hint = (terms.hints / self.whole.normalisers).sum()
                figures.append(torch.stack([total, terms.classification, terms.logit, hint]).detach())
                yield total

        if self._weighting is not None and self.halving.halved:
            self._weighting.learn(parts, lr, self._repeatable.parts)
        descend(self._optimizer, self.whole, losses(), self._clip_norm, self.whole.execution.workers)
        return figures[0] if len(figures) == 1 else torch.stack(figures).sum(dim=0)

    def _loss(self, part: Part, lr: float) -> tuple[Tensor, LossTerms]:
        """What a part adds to the loss of the batch, and to its terms."""
        if self._weighting is None:
            terms = self.whole.terms(part.batch, part.taught).counted(part)
            return self.whole.total(terms), terms
        total, losses = self._weighting.loss(part, lr)
        return total, self.whole.means(losses, part.batch.labels).counted(part)

    def _hints(self, parts: list[Part]) -> Tensor:
        found = [self.whole.terms(part.batch, part.taught).counted(part).hints for part in parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training."""
        average = None if self._average is None else self._average.network.state_dict()
        weighting = None if self._weighting is None else self._weighting.state_dict()
        return {
            "whole": self.whole.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
            "weighting": weighting,
            "halved": self.halving.halved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.whole.load_state_dict(state["whole"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.halving.halved = state["halved"]
        if self._average is not None:
            self._average.network.load_state_dict(state["average"])
        if self._weighting is not None:
            self._weighting.load_state_dict(state["weighting"])

    def close(self) -> None:
        """Takes the taps off the student."""
        self.whole.close()
