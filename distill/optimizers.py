"""The optimizer that a recipe names, and a step of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .recipe import Recipe
from .workers import Workers


def make_optimizer(recipe: Recipe, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a recipe for these parameters, at the recipe's learning rate; fused, as torch has it."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def descend(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    losses: Iterable[Tensor],
    clip_norm: float | None,
    workers: Workers,
) -> None:
    """One step down a sum of losses.

    Args:
        optimizer: of the module's parameters, or some of them.
        module: whose gradients are those of this sum alone afterwards.
        losses: scalars; each is asked for when the graph of the one before is used up.
        clip_norm: the largest norm of all gradients together; larger ones are scaled down. None: no limit.
        workers: all take this step, down the sum of the losses of all of them.
    """
    module.zero_grad(set_to_none=True)
    for loss in losses:
        torch.autograd.backward(loss)
    workers.add_gradients(module.parameters())
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    optimizer.step()
