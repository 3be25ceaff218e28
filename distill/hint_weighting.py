"""One student whose distillation terms are weighed for each image: HKD.

Liu et al. 2023, arXiv 2211.17059; the scheme is this project's, see `DynamicWeights`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Batches
from .dynamic_weights import DynamicWeights
from .hinted_student import HintedStudent, SampleLosses
from .meta_step import MetaStep, WeightedLosses
from .seeding import derived_seed
from .teacher_pass import TeacherOutputs
from .weight_network import WeightHistory, WeightNetwork, weight_optimizer

LOGIT_TERM = "logit"


class HintWeighting:
    """Gives each distillation term of each image a weight of mean 1 over the terms, and learns to.

    In a step: the weight network weighs the present losses; every `meta_every` steps it learns by a virtual step of the
    student; the step itself is weighed by the history of each image. In the epochs of its warm-up all weights are 1.

    Args:
        whole: the student with its hint terms, of which there are at least two with the logit loss.
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
        device = whole.normalisers.device
        self._network = network.to(device)
        self._history = WeightHistory(images, len(self._names), settings.history_momentum).to(device)
        self._optimizer = weight_optimizer(self._network, settings)
        self._meta_step = MetaStep(whole, whole.execution.precision == "bf16")
        self._warmup_epochs = settings.warmup_epochs(first_rung)
        self._step = 0
        self._epoch = 0
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._weighed = 0

    def begin_epoch(self, epoch: int) -> None:
        """Gets ready for an epoch of the main stage, from 1."""
        self._epoch = epoch
        self._sums.zero_()
        self._weighed = 0

    def loss(self, batch: Batch, taught: TeacherOutputs, lr: float) -> tuple[Tensor, SampleLosses]:
        """The loss of a batch with its weights, scalar, and its terms; on the way the weight network learns.

        Args:
            batch: images and labels.
            taught: what the teacher says of them.
            lr: of the step that will follow.
        """
        weighs = self._epoch > self._warmup_epochs and self._settings.meta
        learns = weighs and self._settings.updates_at(self._step)
        with _looking_again(self._whole) if learns else nullcontext() as same_draws:
            found = self._whole.sample_losses(batch, taught)
            losses = WeightedLosses(
                self._whole.hints.classification_weight * self._whole.classification(found.logits, batch.labels),
                _columns(found, len(batch.labels)),
                self._scales(),
            )
            entropy = nn.functional.cross_entropy(found.logits, batch.labels, reduction="none")
            seen = torch.cat([entropy[:, None], losses.hints], dim=1).detach()
            if same_draws is not None:

                def again() -> Tensor:
                    same_draws()
                    return _columns(self._whole.sample_losses(batch, taught, precise=True), len(batch.labels))

                self._learn(losses, seen, lr, again)
        weights = self._weights(batch, seen) if weighs else torch.ones_like(losses.hints)
        self._sums += weights.detach().double().sum(dim=0)
        self._weighed += len(weights)
        return losses.total(weights), found

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

    @torch.no_grad()
    def _weights(self, batch: Batch, seen: Tensor) -> Tensor:
        """What the step is weighed with [B, terms], from the losses that the weight network sees [B, 1 + terms]."""
        self._step += 1
        weights = self._history.ensembled(batch.indices, self._network(seen))
        self._history.write(batch.indices, weights)
        return weights

    def _learn(self, losses: WeightedLosses, seen: Tensor, lr: float, again: Callable[[], Tensor]) -> None:
        seed = derived_seed("meta", self._seed, self._step)
        (meta,) = self._meta.fixed_batches(1, self._settings.meta_batch_size, seed)
        self._optimizer.zero_grad(set_to_none=True)
        self._meta_step(losses, self._network(seen), lr, again, lambda: self._whole.label_loss(meta))
        self._optimizer.step()

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


@contextmanager
def _looking_again(whole: HintedStudent) -> Iterator[Callable[[], None]]:
    """Passes over one batch that must see the same: losses keep of it, at the end, what the first pass left.

    Gives what has torch's generators draw as in that pass again.
    """
    losses = [term.loss for term in whole.hint_terms]
    device = whole.normalisers.device
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def same_draws() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    for loss in losses:
        loss.remembers = False
    try:
        yield same_draws
    finally:
        for loss in losses:
            loss.remembers = True
            loss.catch_up()
