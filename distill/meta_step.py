"""One update of dynamic hint weights: which would have made the student's step better for images it does not train on.

After Shu et al. 2019, arXiv 1902.07379 (Meta-Weight-Net), on hints as in Liu et al. 2023, arXiv 2211.17059 (HKD).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .directional import DirectionalDerivative
from .virtual_pass import with_parameters
from .workers import ALONE, Workers


@dataclass(frozen=True)
class WeightedLosses:
    """The loss of one batch as a function of the weights w: rest + 1/B Σ_b Σ_h λ_h·w_bh·ℓ_bh.

    Attributes:
        rest: what the weights do not touch, scalar: the classification term.
        hints: ℓ [B, hints], of each image, as the losses give them.
        scales: λ [hints], without gradient: configured weight over normaliser.
    """

    rest: Tensor
    hints: Tensor
    scales: Tensor

    def total(self, weights: Tensor) -> Tensor:
        """The loss, scalar; weights [B, hints], of which no gradient is wanted."""
        return self.rest + (self.scales * weights.detach() * self.hints).sum() / len(self.hints)


@dataclass(frozen=True)
class MetaPart:
    """A part of a batch, for a meta step that computes one part after the other.

    Attributes:
        look: by a pass, what the part adds to the loss of the batch, and its weights w [b, hints] as the weight network
            gives them, with the graph to φ. The graph of the pass is used up before the next part is looked at.
        hints_again: ℓ [b, hints] of the part by another pass.
    """

    look: Callable[[], tuple[WeightedLosses, Tensor]]
    hints_again: Callable[[], Tensor]


class MetaStep:
    """The gradient by which a weight network learns.

    The student makes a virtual step of plain gradient descent, θ̂ = θ − η∇L(θ; w), and the weights learn by the loss of
    θ̂ on a meta batch: ∂L_m/∂w_bh = −(η·λ_h/B)·⟨∇L_m(θ̂), ∇ℓ_bh(θ)⟩, exactly. A weight rises iff its hint's gradient
    on that image agrees with the meta gradient.

    It costs a backward pass of the real step's graph, a forward and a backward pass of the meta batch, and one
    directional derivative of the batch. The student's parameters, their gradients and its batch-norm statistics are
    left alone.

    Args:
        module: the student with its hint adapters, which all move in the virtual step.
        bf16: whether the directional derivative computes convolutions in bf16.
        workers: each has a share of the batch and of the meta batch; all make the virtual step of the whole. ∂L_m/∂φ
            is then that of a share, and to be added up.
    """

    def __init__(self, module: nn.Module, bf16: bool = False, workers: Workers = ALONE) -> None:
        self._module, self._workers = module, workers
        self._derivative = DirectionalDerivative(module, bf16)

    def __call__(
        self,
        losses: WeightedLosses,
        weights: Tensor,
        lr: float,
        hints_again: Callable[[], Tensor],
        meta_loss: Callable[[], Tensor],
    ) -> Tensor:
        """Adds ∂L_m/∂φ to the gradients of the weight network's parameters φ.

        Args:
            losses: of the batch, with the graph of the real step, which is kept for it.
            weights: w [B, hints] as the weight network gave them, with the graph to φ, which is used up.
            lr: η, of the student's step.
            hints_again: ℓ [B, hints] of the same batch by another pass; see `DirectionalDerivative` for its precision.
            meta_loss: the loss of the meta batch, scalar, by another pass.

        Returns:
            The meta loss after the virtual step, scalar.
        """
        slope = self._gradient(losses.total(weights), dict(self._trained()), keep=True)
        self._workers.add_named(slope)
        value, meta_slope = self._meta_slope(slope, lr, [meta_loss])
        self._learn(weights, losses.scales, lr, hints_again, meta_slope)
        return value

    def by_parts(self, parts: Sequence[MetaPart], lr: float, meta_losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """The same of a batch whose graph is too large to be kept: each part is passed over once more.

        Args:
            parts: of the batch.
            lr: η, of the student's step.
            meta_losses: what each part of the meta batch adds to its loss, scalar, by a pass.

        Returns:
            The meta loss after the virtual step, scalar.
        """
        slope: dict[str, Tensor] = {}
        looked: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            losses, weights = part.look()
            _add(slope, self._gradient(losses.total(weights), dict(self._trained())))
            looked.append((weights, losses.scales))
        value, meta_slope = self._meta_slope(slope, lr, meta_losses)
        for part, (weights, scales) in zip(parts, looked, strict=True):
            self._learn(weights, scales, lr, part.hints_again, meta_slope)
        return value

    def _learn(
        self,
        weights: Tensor,
        scales: Tensor,
        lr: float,
        hints_again: Callable[[], Tensor],
        meta_slope: Mapping[str, Tensor],
    ) -> None:
        agreement = self._derivative(hints_again, meta_slope)
        gradient = scales * agreement * (-lr / len(agreement))
        torch.autograd.backward(weights, gradient.to(weights.dtype))

    def _meta_slope(
        self, slope: Mapping[str, Tensor], lr: float, meta_losses: Sequence[Callable[[], Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The meta loss and its gradient at θ̂, by the name of the parameter; those it does not reach are left out."""
        virtual = {
            name: (parameter.detach() - lr * slope[name] if name in slope else parameter.detach()).requires_grad_()
            for name, parameter in self._trained()
        }
        values: list[Tensor] = []
        meta_slope: dict[str, Tensor] = {}
        for meta_loss in meta_losses:
            with torch.enable_grad():
                loss = with_parameters(self._module, virtual, meta_loss)
            values.append(loss.detach())
            _add(meta_slope, self._gradient(loss, virtual))
        self._workers.add_named(meta_slope)
        return values[0] if len(values) == 1 else torch.stack(values).sum(), meta_slope

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]

    @staticmethod
    def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
        """Of the parameters that the loss depends on, by their names."""
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=keep, allow_unused=True)
        return {name: slope for name, slope in zip(parameters, found, strict=True) if slope is not None}


def _add(sums: dict[str, Tensor], slopes: Mapping[str, Tensor]) -> None:
    """Adds what another part has; a parameter that only some parts depend on has no slope in the others."""
    for name, slope in slopes.items():
        sums[name] = sums[name] + slope if name in sums else slope
