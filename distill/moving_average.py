"""An exponential moving average of a network's weights."""

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """A copy of a network whose weights and batch-norm statistics follow it: average ← d·average + (1−d)·present.

    Torch's `AveragedModel` reads its step counter from the device in every step, which would wait for it.

    Args:
        network: what is followed; it has no taps yet, or the copy would have them too.
        decay: d, 0..1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._update: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def begin_with(self, network: nn.Module) -> None:
        """Forgets what was, and begins with these weights."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Takes in the present weights; counters are copied."""
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        averaged = [(average, present) for average, present in pairs if average.is_floating_point()]
        self._update([average for average, _ in averaged], [present for _, present in averaged], 0)
        for average, present in pairs:
            if not average.is_floating_point():
                average.copy_(present)
