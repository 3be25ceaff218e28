"""Convolutions and batch norms of dual tensors, by torch's own fused operations.

Torch's derivative of a batch norm is made of a dozen elementwise operations, and under autocast of casts between them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

# Typed Any: torch does not type these functions.
_AD: Any = forward_ad
_ATEN: Any = torch.ops.aten


def dual_operation(function: Callable[..., Any], bf16: bool) -> Callable[..., Tensor] | None:
    """What computes a function of torch on dual tensors in its place; None: torch itself.

    Args:
        function: as a `TorchFunctionMode` is given it.
        bf16: whether convolutions are computed in bf16, as the networks' are; what they give is float32 again.
    """
    if function is torch.conv2d:
        return _convolution_in_bf16 if bf16 else None
    return _batch_norm if function is functional.batch_norm else None


def _convolution_in_bf16(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any
) -> Tensor:
    (x, dx), (w, dw) = _halves(features), _halves(weight)
    b, db = _halves(bias) if bias is not None else (None, None)
    x, w = x.bfloat16(), w.bfloat16()
    value = torch.conv2d(x, w, None if b is None else b.bfloat16(), *how, **named).float()
    parts = [] if dx is None else [torch.conv2d(dx.bfloat16(), w, None, *how, **named)]
    parts += [] if dw is None else [torch.conv2d(x, dw.bfloat16(), None, *how, **named)]
    parts += [] if db is None else [db[:, None, None]]
    return _dual(value, parts)


def _batch_norm(
    features: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return functional.batch_norm(features, mean, variance, weight, bias, training, momentum, eps)
    x, dx = _halves(features)
    w, dw = _halves(weight) if weight is not None else (None, None)
    b, db = _halves(bias) if bias is not None else (None, None)
    # Without running statistics: a pass that is only tried leaves them alone.
    value, centre, scale = _ATEN.native_batch_norm(x, w, b, None, None, True, momentum, eps)
    parts = []
    if dx is not None:
        # How a batch norm's output follows its input is symmetric, so the backward pass is the forward one.
        parts.append(
            _ATEN.native_batch_norm_backward(
                dx.to(x.dtype), x, w, None, None, centre, scale, True, eps, [True, False, False]
            )[0]
        )
    if dw is not None or db is not None:
        zeros = torch.zeros_like(centre)
        slope, shift = zeros if dw is None else dw, zeros if db is None else db
        parts.append(_ATEN.native_batch_norm(x, slope, shift, None, None, True, momentum, eps)[0])
    return _dual(value, parts)


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The value and, if it moves, its tangent."""
    primal, tangent = _AD.unpack_dual(tensor)
    return primal, tangent


def _dual(value: Tensor, parts: list[Tensor]) -> Tensor:
    """A tensor that moves by the sum of the parts."""
    if not parts:
        return value
    tangent = parts[0].to(value.dtype)
    for part in parts[1:]:
        tangent = tangent + part
    made: Tensor = _AD.make_dual(
        value, tangent.expand_as(value).contiguous() if tangent.shape != value.shape else tangent
    )
    return made
