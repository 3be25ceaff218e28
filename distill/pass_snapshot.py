"""What passes of a network change beside gradients, so that a step that failed in the middle can be repeated."""

from collections.abc import Collection
from operator import is_

import torch
from torch import Tensor, nn


class GeneratorStates:
    """The states of the generators that layers and losses draw from, as they are when it is made.

    Args:
        device: where is drawn, besides the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """From now on the same is drawn as then."""
        torch.set_rng_state(self._on_cpu)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


class PassSnapshot:
    """Copies of a module's buffers, such as batch norm's statistics, and of the states of torch's generators.

    It is taken before every step, so it costs little: one grouped copy, and nothing waits for the device.

    Args:
        module: whose buffers are meant.
        device: where it is, and draws.
        left_out: buffers that no pass changes, and that would be copied for nothing.
    """

    def __init__(self, module: nn.Module, device: torch.device, left_out: Collection[Tensor] = ()) -> None:
        self._device = device
        skipped = {id(tensor) for tensor in left_out}
        # A module may put another tensor in a buffer's place, so its place is noted, not the tensor.
        self._places = [
            (owner._buffers, name)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and id(buffer) not in skipped
        ]
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._generators: GeneratorStates | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Remembers how everything is."""
        self._generators = None
        buffers = [buffer for owner, name in self._places if (buffer := owner[name]) is not None]
        if len(self._copies) != len(buffers) or not all(map(is_, buffers, self._buffers)):
            self._buffers, self._copies = buffers, [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._copies, buffers)
        # Last: what failed in the middle restores nothing.
        self._generators = GeneratorStates(self._device)

    @torch.no_grad()
    def restore(self) -> None:
        """Makes everything as it was when `take` was called last; nothing if that failed."""
        if self._generators is None:
            return
        for (owner, name), buffer, copy in zip(self._places, self._buffers, self._copies, strict=True):
            buffer.copy_(copy)
            owner[name] = buffer
        self._generators.restore()
