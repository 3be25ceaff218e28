import pytest
import torch
from hintsearch.distill.moving_average import MovingAverage
from torch import nn


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))


def fill(module: nn.Module, value: float) -> None:
    """Sets all weights and statistics, and counts one batch."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value) if tensor.is_floating_point() else tensor.add_(1)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_average_is_the_geometric_sum_of_all_that_was_followed(decay: float) -> None:
    followed = network()
    fill(followed, 2.0)
    average = MovingAverage(followed, decay)
    values = [3.0, -1.0, 5.0]
    for value in values:
        fill(followed, value)
        average.follow(followed)
    weights = [(1 - decay) * decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = decay ** len(values) * 2.0 + sum(w * v for w, v in zip(weights, values, strict=True))
    state = average.network.state_dict()
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    assert floating == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    for name in floating:
        torch.testing.assert_close(state[name], torch.full_like(state[name], expected))


def test_counters_are_copied() -> None:
    followed = network()
    average = MovingAverage(followed, 0.99)
    for _ in range(3):
        fill(followed, 0.0)
    average.follow(followed)
    assert average.network.get_buffer("1.num_batches_tracked").item() == 3


def test_average_has_weights_of_its_own_without_gradients() -> None:
    followed = network()
    average = MovingAverage(followed, 0.5)
    average.follow(followed)
    fill(average.network, 9.0)
    assert not any(9.0 in parameter for parameter in followed.parameters())
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in followed.parameters())
