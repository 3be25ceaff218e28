from collections.abc import Callable
from typing import Any

import pytest
import torch
from hintsearch.distill.dual_operations import dual_operation
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

AD: Any = forward_ad
Call = Callable[[Callable[..., Tensor], dict[str, Tensor]], Tensor]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value_and_tangent(
    function: Callable[..., Tensor], call: Call, moving: tuple[str, ...], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What `call` makes with this function, and how fast it moves while those tensors do."""
    with AD.dual_level():
        duals = {
            name: AD.make_dual(tensor, numbers(*tensor.shape, seed=50 + place).to(tensor.dtype))
            if name in moving
            else tensor
            for place, (name, tensor) in enumerate(tensors.items())
        }
        primal, tangent = AD.unpack_dual(call(function, duals))
        return primal.clone(), None if tangent is None else tangent.clone()


def normalised(function: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    return function(given["features"], None, None, given.get("weight"), given.get("bias"), True, 0.1, 1e-5)


def convolved(function: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    return function(given["features"], given["weight"], given.get("bias"), 2, 1)


@pytest.mark.parametrize("names", [("features",), ("features", "weight", "bias")])
@pytest.mark.parametrize("moving", [("features",), ("weight",), ("bias",), ("features", "weight", "bias"), ()])
def test_batch_norm_moves_as_torch_has_it(names: tuple[str, ...], moving: tuple[str, ...]) -> None:
    everything = {
        "features": numbers(4, 3, 5, 5, seed=1),
        "weight": numbers(3, seed=2),
        "bias": numbers(3, seed=3),
    }
    tensors = {name: everything[name] for name in names}
    ours = dual_operation(functional.batch_norm, bf16=False)
    assert ours is not None
    found = value_and_tangent(ours, normalised, moving, tensors)
    expected = value_and_tangent(functional.batch_norm, normalised, moving, tensors)
    torch.testing.assert_close(found[0], expected[0])
    if expected[1] is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1])


def test_batch_norm_of_running_statistics_moves_as_torch_has_it() -> None:
    def by_statistics(function: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
        mean, variance = numbers(3, seed=4), numbers(3, seed=5).square() + 1
        return function(given["features"], mean, variance, given["weight"], None, False, 0.1, 1e-5)

    tensors = {"features": numbers(4, 3, 5, 5, seed=1), "weight": numbers(3, seed=2)}
    ours = dual_operation(functional.batch_norm, bf16=True)
    assert ours is not None
    found = value_and_tangent(ours, by_statistics, ("features", "weight"), tensors)
    expected = value_and_tangent(functional.batch_norm, by_statistics, ("features", "weight"), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("moving", [("features",), ("weight",), ("bias",), ("features", "weight", "bias")])
def test_convolution_in_bf16_moves_nearly_as_in_float32(moving: tuple[str, ...]) -> None:
    tensors = {
        "features": numbers(4, 6, 9, 9, seed=1).float(),
        "weight": numbers(8, 6, 3, 3, seed=2).float(),
        "bias": numbers(8, seed=3).float(),
    }
    ours = dual_operation(torch.conv2d, bf16=True)
    assert ours is not None
    found = value_and_tangent(ours, convolved, moving, tensors)
    expected = value_and_tangent(torch.conv2d, convolved, moving, tensors)
    for near, exact in zip(found, expected, strict=True):
        assert near is not None
        assert exact is not None
        assert near.dtype == torch.float32
        assert near.shape == exact.shape
        assert float((near - exact).norm() / exact.norm()) < 0.01


def test_only_what_is_faster_is_replaced() -> None:
    assert dual_operation(torch.conv2d, bf16=False) is None
    assert dual_operation(functional.relu, bf16=True) is None
