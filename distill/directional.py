"""How fast losses of each image change as parameters move in a direction."""

import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..models.errors import reason
from .dual_operations import dual_operation
from .virtual_pass import with_parameters

_log = logging.getLogger("hintsearch.distill")
# Typed Any: torch does not type these functions.
_AD: Any = forward_ad
_SMALLEST_SPEED = 1e-20


class DirectionalDerivative:
    """The inner products of a direction with the gradients of many losses, without computing these gradients.

    By forward-mode differentiation: one pass, exact, about as long as a forward and a backward pass. Where the network
    or a loss has an operation without it, from then on by a central difference: two passes, accurate to some percent
    in float32 for networks of ReLUs, whose slopes jump; what a loss detaches then counts as if it were not detached.
    The log says so, once.

    Args:
        module: whose parameters move. Its batch norms use the batch's statistics and record nothing.
        bf16: whether forward mode computes convolutions in bf16; all else stays in the precision of the losses.
    """

    def __init__(self, module: nn.Module, bf16: bool = False) -> None:
        self._module, self._bf16 = module, bf16
        self._forward_mode = True

    def __call__(self, losses: Callable[[], Tensor], direction: Mapping[str, Tensor]) -> Tensor:
        """Derivatives at the module's present parameters, of the shape of the losses.

        Args:
            losses: runs the module in its present mode; of any shape, such as [B, hints]. An autocast around this call
                is off. If `losses` switches one on, forward mode works, in its precision and slower on CPUs than
                without; a difference of such losses would be rounding.
            direction: of a parameter by its name, as in `named_parameters`; those that are left out do not move.

        Returns:
            Without gradient history; gradients of the parameters are left alone.
        """
        parameters = {name: parameter.detach() for name, parameter in self._module.named_parameters()}
        with torch.autocast(next(iter(parameters.values())).device.type, enabled=False):
            if self._forward_mode:
                try:
                    return self._by_forward_mode(losses, parameters, direction)
                except NotImplementedError as error:
                    self._forward_mode = False
                    _log.warning(
                        "no forward-mode derivative (%s); hint gradients are from now on compared by differences",
                        reason(error),
                    )
            return self._by_difference(losses, parameters, direction)

    def _by_forward_mode(
        self, losses: Callable[[], Tensor], parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Tensor:
        with _LEVEL.entered(), torch.enable_grad(), _ForwardMode(self._bf16):
            moving = {name: _AD.make_dual(parameters[name], tangent) for name, tangent in direction.items()}
            result = with_parameters(self._module, {**parameters, **moving}, losses)
            tangent: Tensor | None = _AD.unpack_dual(result).tangent
            return torch.zeros_like(result).detach() if tangent is None else tangent.detach()

    @torch.no_grad()
    def _by_difference(
        self, losses: Callable[[], Tensor], parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Tensor:
        tangents = list(direction.values())
        moved = [parameters[name] for name in direction]
        step = _step(moved, tangents)

        def at(sign: int) -> Tensor:
            offsets = torch._foreach_mul(tangents, sign * step)
            there = dict(zip(direction, torch._foreach_add(moved, offsets), strict=True))
            return with_parameters(self._module, {**parameters, **there}, losses)

        return (at(1) - at(-1)) / (2 * step)


class _SharedLevel:
    """Torch has one dual level a process, which raises if entered twice: the passes of several threads share it."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._lock:
            _load_decompositions()
            if self._users == 0:
                _AD.enter_dual_level()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    _AD.exit_dual_level()


_LEVEL = _SharedLevel()


@cache
def _load_decompositions() -> None:
    """What torch loads at the first dual tensor, which warns of torch's own use of what it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class _ForwardMode(TorchFunctionMode):
    """Forward mode as it is wanted: by faster operations, and none under `no_grad`, which by itself it goes through."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self._bf16 = bf16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            with _AD._set_fwd_grad_enabled(False):
                return func(*args, **(kwargs or {}))
        return (dual_operation(func, self._bf16) or func)(*args, **(kwargs or {}))


def _step(parameters: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """Of a central difference, scalar: moves the parameters by a small share of their length, 4e-5 in float32.

    On a resnet20 trained for some steps it gave about the smallest errors, 0.5 to 3 percent by the hint: larger shares
    cross more kinks of the ReLUs, smaller ones drown in rounding.
    """
    share = torch.finfo(parameters[0].dtype).eps ** 0.5 / 8
    length, speed = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (parameters, tangents))
    step: Tensor = share * length / speed.clamp_min(_SMALLEST_SPEED)
    return step
