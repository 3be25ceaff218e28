"""The trainable whole, student and hint adapters, and the terms of its loss."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..models.candidates import list_candidates
from ..models.errors import InputError
from ..models.taps import LayerTaps
from .batches import Batch
from .execution import Execution
from .hint_configuration import HintConfiguration
from .losses import HINT_LOSSES, LOGIT_LOSSES, FeatureShape, HintLoss
from .teacher_pass import TeacherOutputs

SMALLEST_NORMALISER = 1e-8


@dataclass(frozen=True)
class LossTerms:
    """The terms of one batch, each without its weight.

    Attributes:
        classification: cross-entropy, scalar.
        logit: logit loss, scalar; 0 if the configuration has none.
        hints: raw hint losses [pairs], before normalisation.
    """

    classification: Tensor
    logit: Tensor
    hints: Tensor


@dataclass(frozen=True)
class Labelling:
    """How labels become a loss.

    Attributes:
        smoothing: share of the target spread evenly over all classes, 0..1.
        class_weights: of each class's images; None: all count the same.
    """

    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None


class HintedStudent(nn.Module):
    """A student, the adapters of its hint losses, and their normalisers: what is trained and checkpointed.

    Adapters run in the precision of the networks; losses are computed in float32 whatever that is.

    Args:
        student: the network to train.
        hints: the configuration; pairs of weight 0 are left out.
        teacher: the network that is taught from, with its own parameters, for the shapes of its layers and for hint
            losses that read them; it does not become part of the module. None if the configuration reads none.
        student_shape: (channels, height, width) of one image as the student takes it.
        teacher_shape: the same for the teacher.
        labelling: how labels become a loss.
        execution: how the student runs.

    Raises:
        InputError: a layer that one of the networks does not have, an unknown loss, a missing teacher.
    """

    normalisers: Tensor
    _pair_weights: Tensor
    _class_weights: Tensor | None

    def __init__(
        self,
        student: nn.Module,
        hints: HintConfiguration,
        teacher: nn.Module | None,
        student_shape: tuple[int, int, int],
        teacher_shape: tuple[int, int, int] | None = None,
        labelling: Labelling | None = None,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.hints = hints
        self._execution, self._labelling = execution or Execution(), labelling or Labelling()
        pairs = hints.active_pairs
        if hints.needs_teacher and teacher is None:
            raise InputError("the hint configuration has a logit or hint loss, but there is no teacher")
        self.hint_losses = nn.ModuleList()
        if teacher is not None:
            ours = _shapes(student, [pair.student_layer for pair in pairs], student_shape)
            theirs = _shapes(teacher, [pair.teacher_layer for pair in pairs], teacher_shape or student_shape)
            for pair, our, their in zip(pairs, ours, theirs, strict=True):
                loss = HINT_LOSSES.get(pair.loss)(our, their)
                loss.read_teacher(teacher.get_submodule(pair.teacher_layer))
                self.hint_losses.append(loss)
        self.register_buffer("normalisers", torch.ones(len(pairs)))
        # Buffers, so that no step copies them to the device; not checkpointed, for they are the configuration's.
        self.register_buffer("_pair_weights", torch.tensor([pair.weight for pair in pairs]), persistent=False)
        weights = self._labelling.class_weights
        self.register_buffer("_class_weights", torch.tensor(weights) if weights else None, persistent=False)
        self._logit_loss = LOGIT_LOSSES.get(hints.logit_loss)
        self._taps = LayerTaps(student, [pair.student_layer for pair in pairs])

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """What is read of the teacher, one path a pair."""
        return tuple(pair.teacher_layer for pair in self.hints.active_pairs)

    def terms(self, batch: Batch, taught: TeacherOutputs | None = None) -> LossTerms:
        """The loss terms of one batch; the student runs in its present mode.

        Args:
            batch: images and labels.
            taught: what the teacher says of the same batch; None if the configuration reads nothing of it.
        """
        with self._execution.autocast():
            logits = self.student(batch.images).float()
            features = self._taps.take()
        classification = nn.functional.cross_entropy(
            logits, batch.labels, self._class_weights, label_smoothing=self._labelling.smoothing
        )
        logit = logits.new_zeros(())
        if taught is None:
            return LossTerms(classification, logit, logits.new_zeros(0))
        if self.hints.logit_weight > 0:
            assert taught.logits is not None
            logit = self._logit_loss(logits, taught.logits, batch.labels, self.hints.temperature).mean()
        losses = cast(Iterable[HintLoss], self.hint_losses)
        hints = [
            self._hint(loss, feature, taught.features[path])
            for loss, feature, path in zip(losses, features, self.teacher_layers, strict=True)
        ]
        return LossTerms(classification, logit, torch.stack(hints) if hints else logits.new_zeros(0))

    def total(self, terms: LossTerms) -> Tensor:
        """γ·classification + α·logit + Σ β·hint/normaliser, scalar."""
        hint = (self._pair_weights * terms.hints / self.normalisers).sum()
        return self.hints.classification_weight * terms.classification + self.hints.logit_weight * terms.logit + hint

    @torch.no_grad()
    def set_normalisers(self, batches: Sequence[Batch], taught: Sequence[TeacherOutputs]) -> None:
        """Sets each hint term's normaliser to its mean absolute value over `batches`, the student as it is now.

        The student runs in training mode, as it will; its batch-norm statistics are left as they were.

        Args:
            batches: what is averaged over.
            taught: what the teacher says of each.

        Raises:
            InputError: a term is below 1e-8, so that no weight could give it a meaning.
        """
        if not len(self.hint_losses):
            return
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        was_training = self.training
        self.train()
        values = torch.stack([self.terms(*pair).hints.abs() for pair in zip(batches, taught, strict=True)]).mean(dim=0)
        self.train(was_training)
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])
        for pair, value in zip(self.hints.active_pairs, values.tolist(), strict=True):
            # Written so that NaN fails too.
            if not value >= SMALLEST_NORMALISER:
                raise InputError(
                    f"the hint loss {pair.loss} of {pair.teacher_layer} → {pair.student_layer} is {value:.3g} at the "
                    f"start, but must be at least {SMALLEST_NORMALISER:g} to be normalised; choose another loss or pair"
                )
        self.normalisers.copy_(values)

    def _hint(self, loss: HintLoss, student: Tensor, teacher: Tensor) -> Tensor:
        with self._execution.autocast():
            student, teacher = loss.adapt(student, teacher)
        return loss.compare(student.float(), teacher.float()).mean()

    def close(self) -> None:
        """Takes the taps off the student."""
        self._taps.close()


def _shapes(model: nn.Module, paths: list[str], image_shape: tuple[int, int, int]) -> list[FeatureShape]:
    if not paths:
        return []
    found = {c.path: FeatureShape(c.channels, c.height, c.width) for c in list_candidates(model, image_shape, paths)}
    return [found[path] for path in paths]
