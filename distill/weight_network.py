"""The network that weighs each hint of each image, and the history of what it gave."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.errors import InputError
from .dynamic_weights import DynamicWeights

FEWEST_HINTS = 2
# A column's spread below this share of its mean is rounding, as that of a loss of the whole batch is.
_SMALLEST_SHARE = 1e-4
_TINY = 1e-30


class WeightNetwork(nn.Module):
    """From the losses of an image to the weights of its hints: one hidden layer, then a softmax times the hints.

    Before it learns, all weights are exactly 1: the last layer starts at zero, weights included, for a zero bias alone
    would leave each image a random preference. So the first update changes the last layer only; the hidden layer has a
    gradient from the second on.

    After Shu et al. 2019, arXiv 1902.07379 (Meta-Weight-Net), with a softmax over the hints in place of a sigmoid.

    Args:
        hints: how many are weighed.
        hidden: units of the hidden layer.

    Raises:
        InputError: fewer than two hints.
    """

    def __init__(self, hints: int, hidden: int) -> None:
        super().__init__()
        if hints < FEWEST_HINTS:
            raise InputError(
                f"dynamic weights share among {hints} hint terms, but need at least {FEWEST_HINTS}: a single one's "
                "would always be 1; add a hint or a logit loss, or use fixed weights"
            )
        self.hidden = nn.Linear(1 + hints, hidden)
        self.last = nn.Linear(hidden, hints)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, losses: Tensor) -> Tensor:
        """Weights [B, hints] of mean 1 over the hints, from the losses [B, 1 + hints], cross-entropy first.

        The losses are detached, and each is standardised over the batch: only how an image compares with the others
        counts, so the weights do not depend on a loss's scale, and of a single image nothing is known.
        """
        scores: Tensor = self.last(functional.relu(self.hidden(_standardised(losses.detach()))))
        # Not a softmax times the hints, which need not be 1 to the last digit where all are equal.
        shares = (scores - scores.detach().amax(dim=1, keepdim=True)).exp()
        return shares / shares.mean(dim=1, keepdim=True)


class WeightHistory(nn.Module):
    """The weights of each training image over its visits, which the student is trained with.

    At the first visit the present ones, then m·history + (1−m)·present; of mean 1 over the hints. Weights that follow
    the present ones slowly vary less with the one batch that they were estimated on.

    It is made of buffers, so a state dict holds all of it; nothing waits for the device.

    Args:
        images: of the training split.
        hints: weights of each.
        momentum: m, 0 <= m < 1; with 0 it gives the present weights.
    """

    values: Tensor
    seen: Tensor

    def __init__(self, images: int, hints: int, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        self.register_buffer("values", torch.ones(images, hints))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool))

    @torch.no_grad()
    def ensembled(self, indices: Tensor, weights: Tensor) -> Tensor:
        """What a step is to train with; nothing is written.

        Args:
            indices: of the batch's images in the training split [B], int64.
            weights: the present ones [B, hints].

        Returns:
            [B, hints], without gradient history.
        """
        mixed = torch.lerp(self.values[indices].to(weights.dtype), weights, 1 - self._momentum)
        chosen = torch.where(self.seen[indices][:, None], mixed, weights)
        return chosen / chosen.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def write(self, indices: Tensor, ensembled: Tensor) -> None:
        """Makes what `ensembled` gave the history of these images."""
        self.values.index_copy_(0, indices, ensembled.to(self.values.dtype))
        self.seen.index_fill_(0, indices, True)


def weight_optimizer(network: WeightNetwork, settings: DynamicWeights) -> torch.optim.Optimizer:
    """What a weight network learns by.

    Its gradients shrink with the student's learning rate, down to none at the end of a rung. Adam is indifferent to
    that, but with weight decay among the gradients only the decay would be left, at full speed: so it is kept apart.
    """
    return torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)


def _standardised(losses: Tensor) -> Tensor:
    """Each column less its mean, over its population standard deviation; a column without spread becomes zeros."""
    sd, mean = torch.std_mean(losses, dim=0, correction=0, keepdim=True)
    return (losses - mean) / (sd + _SMALLEST_SHARE * mean.abs() + _TINY)
