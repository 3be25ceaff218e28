"""The trainable whole, student and hint adapters, and the terms of its loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..models.errors import InputError
from ..models.taps import LayerTaps
from .batches import Batch
from .execution import Execution
from .hint_configuration import HintConfiguration
from .hint_terms import HintTerm, make_hint_terms
from .loss_names import find_logit_loss, logit_loss_couples
from .losses import Samples
from .parts import Part
from .teacher_pass import TeacherOutputs

SMALLEST_NORMALISER = 1e-8


@dataclass(frozen=True)
class LossTerms:
    """The terms of one batch, each without its weight.

    Attributes:
        classification: cross-entropy, scalar.
        logit: logit loss, scalar; 0 if the configuration has none.
        hints: raw hint losses [terms], before normalisation.
    """

    classification: Tensor
    logit: Tensor
    hints: Tensor

    def counted(self, part: Part) -> "LossTerms":
        """What they add to the means of the whole batch that the part is of."""
        if part.is_whole:
            return self
        return LossTerms(part.labels * self.classification, part.images * self.logit, part.images * self.hints)


@dataclass(frozen=True)
class SampleLosses:
    """The terms of one batch before any mean is taken.

    Attributes:
        logits: the student's, float32 [B, classes].
        logit: logit loss of each image [B], or a scalar where it is one of the whole batch; None if there is none.
        hints: raw hint losses, each likewise.
    """

    logits: Tensor
    logit: Tensor | None
    hints: tuple[Tensor, ...]


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
        labels: int64 [N] of all training images, for hint losses that read them; None: there are none.
        frozen_norms: whether batch norms, the adapters' too, use the statistics they have, and record none.

    Raises:
        InputError: a layer that one of the networks does not have, an unknown loss, a missing teacher.
    """

    normalisers: Tensor
    _hint_weights: Tensor
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
        labels: Tensor | None = None,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self._frozen_norms = frozen_norms
        self.hints = hints
        self.execution, self._labelling = execution or Execution(), labelling or Labelling()
        if hints.needs_teacher and teacher is None:
            raise InputError("the hint configuration has a logit or hint loss, but there is no teacher")
        terms: list[HintTerm] = []
        if teacher is not None and hints.has_hint_terms:
            terms = make_hint_terms(hints, student, teacher, student_shape, teacher_shape or student_shape, labels)
        self._terms = nn.ModuleList(terms)
        self.register_buffer("normalisers", torch.ones(len(terms)))
        # Buffers, so that no step copies them to the device; not checkpointed, for they are the configuration's.
        self.register_buffer("_hint_weights", torch.tensor([term.weight for term in terms]), persistent=False)
        weights = self._labelling.class_weights
        self.register_buffer("_class_weights", torch.tensor(weights) if weights else None, persistent=False)
        self._logit_loss = find_logit_loss(hints.logit_loss)
        self._taps = LayerTaps(student, list(dict.fromkeys(path for term in terms for path in term.student_taps)))

    @property
    def hint_terms(self) -> tuple[HintTerm, ...]:
        """The hint terms, in the order of `LossTerms.hints`."""
        return tuple(cast(Iterable[HintTerm], self._terms))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """What is read of the teacher, each path once."""
        return tuple(dict.fromkeys(path for term in self.hint_terms for path in term.teacher_taps))

    @property
    def hint_scales(self) -> Tensor:
        """What raw hint terms are multiplied by [terms]: weight over normaliser."""
        return self._hint_weights / self.normalisers

    @property
    def class_weights(self) -> Tensor | None:
        """Of each class's images [classes]; None: all count the same."""
        return self._class_weights

    @property
    def kept_buffers(self) -> list[Tensor]:
        """Those of the hint losses that no pass writes to while they do not remember."""
        return [term.loss.get_buffer(name) for term in self.hint_terms for name in term.loss.kept]

    @property
    def draws(self) -> bool:
        """Whether a hint loss reads torch's global generator."""
        return any(term.loss.draws for term in self.hint_terms)

    @property
    def pair_normalisers(self) -> tuple[float | None, ...]:
        """For each pair of the configuration the constant that its loss is divided by; None: it is left out."""
        found = zip(self.hint_terms, self.normalisers.tolist(), strict=True)
        by_pair = {id(pair): value for term, value in found for pair in term.pairs}
        return tuple(by_pair.get(id(pair)) for pair in self.hints.pairs)

    def train(self, mode: bool = True) -> "HintedStudent":
        """Training mode, or evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        if mode and self._frozen_norms:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        return self

    def sample_losses(self, batch: Batch, taught: TeacherOutputs | None = None, precise: bool = False) -> SampleLosses:
        """The losses of one batch before any mean; the student runs in its present mode.

        Args:
            batch: images and labels.
            taught: what the teacher says of the same batch; None if the configuration reads nothing of it.
            precise: whether no autocast is used, whatever the execution says.
        """
        execution = replace(self.execution, precision="fp32") if precise else self.execution
        logits, features = self._run(batch.images, execution)
        if taught is None:
            return SampleLosses(logits, None, ())
        logit = None
        if self.hints.logit_weight > 0:
            assert taught.logits is not None
            logit = self._logits_compared(logits, taught.logits, batch)
        samples = Samples(batch.indices, batch.labels)
        hints = [term(features, taught.features, samples, execution, batch.whole) for term in self.hint_terms]
        return SampleLosses(logits, logit, tuple(hints))

    def hint_loss(self, number: int, batch: Batch, taught: TeacherOutputs) -> Tensor:
        """One hint term alone, raw and a mean over the images; arguments as those of `sample_losses`."""
        _, features = self._run(batch.images, self.execution)
        samples = Samples(batch.indices, batch.labels)
        loss: Tensor = self.hint_terms[number](features, taught.features, samples, self.execution, batch.whole)
        return loss.mean()

    def terms(self, batch: Batch, taught: TeacherOutputs | None = None) -> LossTerms:
        """The loss terms of one batch, means over its images; arguments as those of `sample_losses`."""
        return self.means(self.sample_losses(batch, taught), batch.labels)

    def means(self, losses: SampleLosses, labels: Tensor) -> LossTerms:
        """The terms of a batch with labels [B], means of its losses."""
        nothing = losses.logits.new_zeros(())
        logit = nothing if losses.logit is None else losses.logit.mean()
        hints = torch.stack([hint.mean() for hint in losses.hints]) if losses.hints else losses.logits.new_zeros(0)
        return LossTerms(self.classification(losses.logits, labels), logit, hints)

    def label_loss(self, batch: Batch) -> Tensor:
        """The cross-entropy of one batch alone, scalar; the student runs in its present mode."""
        logits, _ = self._run(batch.images, self.execution)
        return self.classification(logits, batch.labels)

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of logits [B, classes] with labels [B], as the labelling has it; scalar."""
        return nn.functional.cross_entropy(
            logits, labels, self._class_weights, label_smoothing=self._labelling.smoothing
        )

    def total(self, terms: LossTerms) -> Tensor:
        """γ·classification + α·logit + Σ β·hint/normaliser, scalar: all of them with fixed weights."""
        hint = (self.hint_scales * terms.hints).sum()
        return self.hints.classification_weight * terms.classification + self.hints.logit_weight * terms.logit + hint

    @torch.no_grad()
    def set_normalisers(
        self,
        batches: Sequence[Batch],
        taught: Iterable[TeacherOutputs],
        hints_of: Callable[[Batch, TeacherOutputs], Tensor] | None = None,
    ) -> None:
        """Sets each hint term's normaliser to its mean absolute value over `batches`, the student as it is now.

        If the configuration normalises; else they stay 1.

        The student runs in training mode, as it will; its batch-norm statistics are left as they were.

        Args:
            batches: what is averaged over.
            taught: what the teacher says of each.
            hints_of: computes the raw hint losses [terms] of a batch; None: as `terms` does.

        Raises:
            InputError: a term is below 1e-8, so that no weight could give it a meaning.
        """
        if not self.hint_terms or not self.hints.normalise:
            return
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        was_training = self.training
        self.train()
        hints_of = hints_of or (lambda batch, taught: self.terms(batch, taught).hints)
        values = torch.stack([hints_of(*pair) for pair in zip(batches, taught, strict=True)])
        self.execution.workers.add([values])
        values = values.abs().mean(dim=0)
        self.train(was_training)
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])
        for term, value in zip(self.hint_terms, values.tolist(), strict=True):
            # Written so that NaN fails too.
            if not value >= SMALLEST_NORMALISER:
                pair = term.pairs[0]
                raise InputError(
                    f"the hint loss {pair.loss} of {pair.teacher_layer} → {pair.student_layer} is {value:.3g} at the "
                    f"start, but must be at least {SMALLEST_NORMALISER:g} to be normalised; choose another loss or pair"
                )
        self.normalisers.copy_(values)

    def _logits_compared(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """The logit loss of each image [B], or a scalar where it is one of the whole batch."""
        labels, temperature = batch.labels, self.hints.temperature
        if batch.whole is None or not logit_loss_couples(self.hints.logit_loss):
            return self._logit_loss(ours, theirs, labels, temperature)
        workers, images = self.execution.workers, len(batch.whole.labels)
        all_ours, all_theirs = workers.gather(ours, images), workers.gather(theirs, images)
        return workers.share(self._logit_loss(all_ours, all_theirs, batch.whole.labels, temperature))

    def _run(self, images: Tensor, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits, float32, and what was tapped, by path."""
        with execution.autocast():
            logits = self.student(images).float()
            return logits, dict(zip(self._taps.paths, self._taps.take(), strict=True))

    def forget(self) -> None:
        """Holds nothing of a pass that failed in the middle, and lets no hint loss keep anything of it."""
        self._taps.forget()
        for term in self.hint_terms:
            term.loss.forget()

    def close(self) -> None:
        """Takes the taps off the student."""
        self._taps.close()
