"""The trainable whole, student and hint adapters, and the terms of its loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.candidates import list_candidates
from ..models.errors import InputError
from ..models.taps import LayerTaps
from .batches import Batch
from .hint_configuration import HintConfiguration
from .losses import HINT_LOSSES, LOGIT_LOSSES, FeatureShape

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


class HintedStudent(nn.Module):
    """A student, the adapters of its hint losses, and their normalisers: what is trained and checkpointed.

    The teacher is read, but is no part of the module: it is never saved with the student.

    Args:
        student: the network to train.
        hints: the configuration; pairs of weight 0 are left out.
        teacher: the frozen teacher; needed if the configuration reads it.
        image_shape: (channels, height, width) of one image.

    Raises:
        InputError: a layer that one of the networks does not have, an unknown loss, a missing teacher.
    """

    normalisers: Tensor
    _pair_weights: Tensor

    def __init__(
        self,
        student: nn.Module,
        hints: HintConfiguration,
        teacher: nn.Module | None,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.student = student
        self.hints = hints
        pairs = hints.active_pairs
        if hints.needs_teacher and teacher is None:
            raise InputError("the hint configuration has a logit or hint loss, but there is no teacher")
        self.hint_losses = nn.ModuleList()
        if teacher is not None:
            student_shapes = _shapes(student, [pair.student_layer for pair in pairs], image_shape)
            teacher_shapes = _shapes(teacher, [pair.teacher_layer for pair in pairs], image_shape)
            for pair, ours, theirs in zip(pairs, student_shapes, teacher_shapes, strict=True):
                self.hint_losses.append(HINT_LOSSES.get(pair.loss)(ours, theirs))
            teacher.eval().requires_grad_(False)
        self.register_buffer("normalisers", torch.ones(len(pairs)))
        # A buffer, so that no step copies them to the device; not checkpointed, for they are the configuration's.
        self.register_buffer("_pair_weights", torch.tensor([pair.weight for pair in pairs]), persistent=False)
        self._logit_loss = LOGIT_LOSSES.get(hints.logit_loss)
        # A tuple hides the teacher from nn.Module's registration of children.
        self._teacher = (teacher if hints.needs_teacher else None,)
        self._student_taps = LayerTaps(student, [pair.student_layer for pair in pairs])
        self._teacher_taps = LayerTaps(teacher, [pair.teacher_layer for pair in pairs]) if teacher else None

    def terms(self, batch: Batch) -> LossTerms:
        """The loss terms of one batch; the student runs in its present mode."""
        logits = self.student(batch.images)
        features = self._student_taps.take()
        nothing = logits.new_zeros(())
        classification = nn.functional.cross_entropy(logits, batch.labels)
        teacher = self._teacher[0]
        if teacher is None or self._teacher_taps is None:
            return LossTerms(classification, nothing, logits.new_zeros(0))
        with torch.no_grad():
            teacher_logits = teacher(batch.images)
        teacher_features = self._teacher_taps.take()
        logit = nothing
        if self.hints.logit_weight > 0:
            logit = self._logit_loss(logits, teacher_logits, self.hints.temperature)
        hints = [
            loss(ours, theirs) for loss, ours, theirs in zip(self.hint_losses, features, teacher_features, strict=True)
        ]
        return LossTerms(classification, logit, torch.stack(hints) if hints else logits.new_zeros(0))

    def total(self, terms: LossTerms) -> Tensor:
        """γ·classification + α·logit + Σ β·hint/normaliser, scalar."""
        hint = (self._pair_weights * terms.hints / self.normalisers).sum()
        return self.hints.classification_weight * terms.classification + self.hints.logit_weight * terms.logit + hint

    @torch.no_grad()
    def set_normalisers(self, batches: Sequence[Batch]) -> None:
        """Sets each hint term's normaliser to its mean absolute value over `batches`, the student as it is now.

        The student runs in training mode, as it will; its batch-norm statistics are left as they were.

        Raises:
            InputError: a term is below 1e-8, so that no weight could give it a meaning.
        """
        if not len(self.hint_losses):
            return
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        was_training = self.training
        self.train()
        values = torch.stack([self.terms(batch).hints.abs() for batch in batches]).mean(dim=0)
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

    def close(self) -> None:
        """Takes the taps off both networks."""
        self._student_taps.close()
        if self._teacher_taps is not None:
            self._teacher_taps.close()


def _shapes(model: nn.Module, paths: list[str], image_shape: tuple[int, int, int]) -> list[FeatureShape]:
    if not paths:
        return []
    found = {c.path: FeatureShape(c.channels, c.height, c.width) for c in list_candidates(model, image_shape, paths)}
    return [found[path] for path in paths]
