"""One student whose distillation terms are weighed for each image: HKD.

Liu et al. 2023, arXiv 2211.17059; the scheme is this project's, see `DynamicWeights`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Batches
from .dynamic_weights import DynamicWeights
from .hinted_student import HintedStudent, SampleLosses
from .meta_step import MetaPart, MetaStep, WeightedLosses
from .parts import Part, split
from .pass_snapshot import GeneratorStates, PassSnapshot
from .seeding import derived_seed
from .weight_network import WeightHistory, WeightNetwork, weight_optimizer

LOGIT_TERM = "logit"


class HintWeighting:
    """Gives each distillation term of each image a weight of mean 1 over the terms, and learns to.

    In a step: the weight network weighs the present losses; every `meta_every` steps it learns by a virtual step of the
    student; the step itself is weighed by the history of each image. In the epochs of its warm-up all weights are 1.

    Args:
        whole: the student with its hint terms, of which there are at least two with the logit loss. They must not
            remember, for a batch is passed over several times.
        settings: how.
        images: of the training split.
        meta: what the weight network learns by; no image of the training split.
        first_rung: epochs of the first rung.
        seed: of the weight network and of the order of the meta images.

    Raises:
        InputError: fewer than two terms.
    """

    def __init__(
        self,
        whole: HintedStudent,
        settings: DynamicWeights,
        images: int,
        meta: Batches,
        first_rung: int,
        seed: int,
    ) -> None:
        self._whole, self._settings, self._meta, self._seed = whole, settings, meta, seed
        logit = [LOGIT_TERM] if whole.hints.logit_weight > 0 else []
        self._names = _distinct([*logit, *(term.name for term in whole.hint_terms)])
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed("weights", seed))
            network = WeightNetwork(len(self._names), settings.hidden)
        device = self._device = whole.normalisers.device
        self._network = network.to(device)
        self._history = WeightHistory(images, len(self._names), settings.history_momentum).to(device)
        self._optimizer = weight_optimizer(self._network, settings)
        self._workers = whole.execution.workers
        self._meta_step = MetaStep(whole, whole.execution.precision == "bf16", self._workers)
        self._warmup_epochs = settings.warmup_epochs(first_rung)
        self._step = 0
        self._epoch = 0
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._weighed = 0
        self._passes = PassSnapshot(whole, device, whole.kept_buffers)
        self._before: _Before | None = None
        self._has_learned = False
        # Indices, weights and their sums over the images, of the parts of the present step.
        self._weighed_now: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin_epoch(self, epoch: int) -> None:
        """Gets ready for an epoch of the main stage, from 1."""
        self._epoch = epoch
        self._sums.zero_()
        self._weighed = 0

    def learn(self, parts: Sequence[Part], lr: float, split: Callable[[Batch], list[Part]]) -> None:
        """Lets the weight network learn part by part, before any is weighed, where a whole batch may not fit.

        The update is that of the whole batch, for which each part is passed over once more.

        Args:
            parts: of the batch.
            lr: of the step that will follow.
            split: into the parts in which a batch is computed.
        """
        if not self._learns:
            return
        self._passes.take()
        meta = [partial(self._meta_loss, part) for part in split(self._meta_batch())]
        self._optimizer.zero_grad(set_to_none=True)
        self._meta_step.by_parts([self._meta_part(part) for part in parts], lr, meta)
        self._optimizer.step()
        # The passes of the step itself see and leave what they would without these.
        self._passes.restore()
        self._has_learned = True

    def loss(self, part: Part, lr: float) -> tuple[Tensor, SampleLosses]:
        """What a part adds to the loss of the batch with its weights, scalar, and the losses of its images.

        On the way the weight network learns, unless `learn` has been called.

        Args:
            part: of the batch.
            lr: of the step that will follow.
        """
        states = GeneratorStates(self._device)
        losses, seen, found = self._look(part)
        if self._learns and not self._has_learned:
            self._before = _Before(self._network, self._optimizer)
            self._learn_by(losses, seen, lr, partial(self._hints_again, part, states), part)
        weights = self._weights(part.batch, seen) if self._weighs else torch.ones_like(losses.hints)
        self._weighed_now.append(self._of_whole(part.batch, weights))
        return losses.total(weights), found

    def keep(self) -> None:
        """At the end of a step: its images have these weights."""
        for indices, weights, sums in self._weighed_now:
            if self._weighs:
                self._history.write(indices, weights)
            self._sums += sums
            self._weighed += len(weights)
        self._step += self._weighs
        self._forget()

    def undo(self) -> None:
        """Makes everything as it was before a step that failed in the middle."""
        if self._before is not None:
            self._before.restore()
        self._forget()

    def metrics(self) -> dict[str, float]:
        """The mean weight of each term over the epoch's images, as `hint_weight.NAME`."""
        means = (self._sums / max(self._weighed, 1)).tolist()
        return {f"hint_weight.{name}": mean for name, mean in zip(self._names, means, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training."""
        return {
            "network": self._network.state_dict(),
            "history": self._history.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._network.load_state_dict(state["network"])
        self._history.load_state_dict(state["history"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]

    @property
    def _weighs(self) -> bool:
        """Whether images have weights other than 1 in this epoch."""
        return self._epoch > self._warmup_epochs and self._settings.meta

    @property
    def _learns(self) -> bool:
        """Whether the weight network learns in this step."""
        return self._weighs and self._settings.updates_at(self._step)

    def _look(self, part: Part) -> tuple[WeightedLosses, Tensor, SampleLosses]:
        """By a pass: what a part adds to the loss, what the weight network sees [B, 1 + terms], all losses."""
        labels = part.batch.labels
        found = self._whole.sample_losses(part.batch, part.taught)
        rest = self._whole.hints.classification_weight * self._whole.classification(found.logits, labels)
        losses = WeightedLosses(rest, _columns(found, len(labels)), self._scales())
        if not part.is_whole:
            losses = replace(losses, rest=part.labels * rest, scales=part.images * losses.scales)
        entropy = nn.functional.cross_entropy(found.logits, labels, reduction="none")
        return losses, torch.cat([entropy[:, None], losses.hints], dim=1).detach(), found

    def _hints_again(self, part: Part, states: GeneratorStates) -> Tensor:
        """ℓ [B, terms] by another pass with the same random numbers."""
        states.restore()
        return _columns(self._whole.sample_losses(part.batch, part.taught, precise=True), len(part.batch.labels))

    def _meta_part(self, part: Part) -> MetaPart:
        states: list[GeneratorStates] = []

        def look() -> tuple[WeightedLosses, Tensor]:
            states.append(GeneratorStates(self._device))
            losses, seen, _ = self._look(part)
            return losses, self._present_weights(part.batch, seen)

        return MetaPart(look, lambda: self._hints_again(part, states[0]))

    def _meta_loss(self, part: Part) -> Tensor:
        loss = self._whole.label_loss(part.batch)
        return loss if part.is_whole else part.labels * loss

    @torch.no_grad()
    def _weights(self, batch: Batch, seen: Tensor) -> Tensor:
        """What images are weighed with [B, terms], from the losses that the weight network sees [B, 1 + terms]."""
        return self._history.ensembled(batch.indices, self._present_weights(batch, seen))

    def _present_weights(self, batch: Batch, seen: Tensor) -> Tensor:
        """What the weight network gives [B, terms] of what it sees [B, 1 + terms]: among the images of the batch."""
        if batch.whole is None:
            weights: Tensor = self._network(seen)
            return weights
        return self._workers.share(self._network(self._workers.gather(seen, len(batch.whole.labels))))

    @torch.no_grad()
    def _of_whole(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, weights and their sums, of all images of a batch, of which this process may have a share."""
        indices, of_all = batch.indices, weights.detach()
        if batch.whole is not None:
            indices, of_all = batch.whole.indices, self._workers.gather(of_all, len(batch.whole.labels))
        return indices, of_all, of_all.double().sum(dim=0)

    def _learn_by(
        self, losses: WeightedLosses, seen: Tensor, lr: float, again: Callable[[], Tensor], part: Part
    ) -> None:
        batch = self._meta_batch()
        (meta,) = split(batch, None, [(0, len(batch.labels))], self._whole.class_weights)
        self._optimizer.zero_grad(set_to_none=True)
        self._meta_step(losses, self._present_weights(part.batch, seen), lr, again, partial(self._meta_loss, meta))
        self._workers.add_gradients(self._network.parameters())
        self._optimizer.step()

    def _meta_batch(self) -> Batch:
        seed = derived_seed("meta", self._seed, self._step)
        (meta,) = self._meta.fixed_batches(1, self._settings.meta_batch_size, seed, self._workers)
        return meta

    def _forget(self) -> None:
        self._before, self._has_learned = None, False
        self._weighed_now.clear()

    def _scales(self) -> Tensor:
        """λ [terms]: configured weight over normaliser."""
        hints = self._whole.hint_scales
        if self._whole.hints.logit_weight == 0:
            return hints
        return torch.cat([hints.new_full((1,), self._whole.hints.logit_weight), hints])


def _distinct(names: list[str]) -> list[str]:
    """The names, a repeated one with its place: two own functions may have one name."""
    return [f"{name}.{place}" if name in names[: place - 1] else name for place, name in enumerate(names, start=1)]


def _columns(found: SampleLosses, images: int) -> Tensor:
    """ℓ [B, terms]; a loss of the whole batch counts alike for each image."""
    logit = [] if found.logit is None else [found.logit]
    return torch.stack([loss.expand(images) for loss in (*logit, *found.hints)], dim=1)


class _Before:
    """The weight network and its optimizer before they learn."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._new = optimizer, not optimizer.state
        moments = [value for state in optimizer.state.values() for value in state.values()]
        self._tensors = [*network.parameters(), *moments]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        if self._new:
            self._optimizer.state.clear()
