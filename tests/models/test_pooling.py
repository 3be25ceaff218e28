import pytest
import torch
from hintsearch.models.pooling import GlobalAveragePool
from torch import nn
from torch.nn import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_average_is_the_mean_of_each_map(dtype: torch.dtype) -> None:
    maps = torch.randn(3, 16, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    pooled = GlobalAveragePool()(maps)
    assert (pooled.shape, pooled.dtype) == ((3, 16, 1, 1), dtype)
    # The sum is in float32: bf16 rounds the result alone, at 2⁻⁸.
    expected = maps.double().mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(pooled.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_gradient_of_the_global_average_is_that_of_the_mean_and_dense() -> None:
    maps = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    outer = torch.randn(2, 4, 1, 1)
    (dense,) = torch.autograd.grad(GlobalAveragePool()(maps), maps, outer)
    (seen_everywhere,) = torch.autograd.grad(functional.adaptive_avg_pool2d(maps, 1), maps, outer)
    torch.testing.assert_close(dense, seen_everywhere)
    assert dense.is_contiguous(memory_format=torch.channels_last)


def test_global_average_has_nothing_to_load() -> None:
    assert not nn.Sequential(GlobalAveragePool()).state_dict()
