"""Passes of a network that are only asked a question: with other parameters, and leaving everything as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

T = TypeVar("T")


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor], call: Callable[[], T]) -> T:
    """What `call` gives while these tensors stand in for the module's parameters.

    The parameters themselves are not written, so a graph that holds them stays valid, and there is nothing to restore
    but which tensors the module has. That, batch-norm statistics and the generators of random numbers are as before,
    even if `call` raises; so several passes in a row have the same dropout. A module may be used by one thread at a
    time.

    Args:
        module: whose parameters are replaced.
        parameters: by name, as in `named_parameters`, at least one; those that are left out stay.
        call: runs the module, or parts of it.
    """
    named = {f"module.{name}": parameter for name, parameter in parameters.items()}
    device = next(iter(parameters.values())).device
    generators = [device] if device.type == "cuda" else []
    with untracked_batch_norm(module), torch.random.fork_rng(generators):
        result: T = functional_call(_Holder(module), named, (call,))
    return result


@contextmanager
def untracked_batch_norm(module: nn.Module) -> Iterator[None]:
    """Every normalisation layer in training mode goes on to use its batch's statistics, but records nothing.

    Layers in evaluation mode record nothing anyway and stay as they are. A module may be used by one thread at a time.

    Args:
        module: whose layers are meant.
    """
    kind = nn.modules.batchnorm._NormBase
    recording = [m for m in module.modules() if isinstance(m, kind) and m.training and m.track_running_stats]
    for layer in recording:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in recording:
            layer.track_running_stats = True


class _Holder(nn.Module):
    """Lets any call take the place of a module's forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[], T]) -> T:
        return call()
