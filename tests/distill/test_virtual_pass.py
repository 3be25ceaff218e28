import pytest
import torch
from hintsearch.distill.virtual_pass import untracked_batch_norm, with_parameters
from small_student import is_as_it_was, lesson, state_of
from torch import nn


def test_call_sees_the_parameters_that_stand_in() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    images, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    expected = module[1](torch.tensor([[11.0]]))
    assert torch.equal(with_parameters(module, {"0.weight": weight}, lambda: module(images)), expected)


def test_tied_parameters_are_replaced_together() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    module[1].weight = module[0].weight
    result = with_parameters(module, {"0.weight": torch.tensor([[3.0]])}, lambda: module(torch.ones(1, 1)))
    assert result.item() == 9


def test_pass_leaves_the_module_as_it_was() -> None:
    given = lesson()
    before = state_of(given.whole)
    zeros = {name: torch.zeros_like(p) for name, p in given.whole.named_parameters()}
    logits = with_parameters(given.whole, zeros, lambda: given.whole.outputs(given.images).logits)
    assert not logits.any()
    assert is_as_it_was(given.whole, before)


def test_error_in_the_pass_leaves_the_module_as_it_was() -> None:
    given = lesson()
    before = state_of(given.whole)

    def fail() -> None:
        given.whole.outputs(given.images)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        with_parameters(given.whole, {"student.fc.bias": torch.ones(4, dtype=torch.float64)}, fail)
    assert is_as_it_was(given.whole, before)


def test_graph_from_before_the_pass_is_still_valid() -> None:
    given = lesson()
    loss = given.cross_entropies().sum()
    with_parameters(given.whole, {"student.fc.bias": torch.ones(4, dtype=torch.float64)}, given.cross_entropies)
    loss.backward()
    assert given.whole.student.conv1.weight.grad is not None


def test_passes_draw_the_same_random_numbers_and_take_none() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    parameters = dict(module.named_parameters())
    before = torch.get_rng_state()
    first, second = (with_parameters(module, parameters, lambda: module(torch.ones(4, 8))) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norm_in_training_uses_its_batch_and_records_nothing() -> None:
    layer = nn.BatchNorm1d(3)
    images = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    before = state_of(layer)
    with untracked_batch_norm(layer):
        result = layer(images)
    torch.testing.assert_close(result, (images - images.mean(0)) / (images.var(0, correction=0) + layer.eps).sqrt())
    assert is_as_it_was(layer, before)
    layer(images)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_frozen_normalisation_uses_its_statistics(kind: type[nn.BatchNorm1d | nn.InstanceNorm1d]) -> None:
    layer = kind(3, track_running_stats=True).eval()
    with torch.no_grad():
        layer.running_mean.fill_(2.0)
    with untracked_batch_norm(layer):
        result = layer(torch.zeros(2, 3, 4))
    torch.testing.assert_close(result, torch.full((2, 3, 4), -2.0), rtol=1e-4, atol=0)


def test_layer_that_never_records_stays_so() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    with untracked_batch_norm(layer):
        pass
    assert not layer.track_running_stats
