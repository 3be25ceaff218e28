import io

import pytest
import torch
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.weight_network import WeightHistory, WeightNetwork, weight_optimizer
from hintsearch.models.errors import InputError
from torch import Tensor


def network(hints: int, learned: bool = True) -> WeightNetwork:
    """A weight network; `learned`: one whose last layer is no longer zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = WeightNetwork(hints, hidden=20)
        if learned:
            torch.nn.init.normal_(made.last.weight)
            torch.nn.init.normal_(made.last.bias)
        return made


def losses(images: int, hints: int) -> Tensor:
    return torch.rand(images, 1 + hints, generator=torch.Generator().manual_seed(4)) + 0.5


@pytest.mark.parametrize("hints", [2, 3, 7, 41, 49])
def test_weights_start_as_ones_exactly(hints: int) -> None:
    weights = network(hints, learned=False)(losses(6, hints))
    assert torch.equal(weights, torch.ones(6, hints))


def test_weights_are_a_softmax_of_the_standardised_losses_times_the_hints() -> None:
    made, given = network(3), losses(6, 3)
    standardised = (given - given.mean(0)) / given.std(0, correction=0)
    hidden = (standardised @ made.hidden.weight.t() + made.hidden.bias).clamp(min=0)
    expected = 3 * (hidden @ made.last.weight.t() + made.last.bias).softmax(dim=1)
    torch.testing.assert_close(made(given), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made(given).mean(dim=1), torch.ones(6))
    assert made(given).std(dim=0).min() > 0.05


def test_scores_beyond_the_range_of_the_exponential_are_weighed() -> None:
    made = network(2)
    with torch.no_grad():
        made.last.weight.zero_()
        made.last.bias.copy_(torch.tensor([1000.0, -1000.0]))
    torch.testing.assert_close(made(losses(3, 2)), torch.tensor([[2.0, 0.0]]).expand(3, 2))


def test_scale_and_offset_of_a_loss_do_not_count() -> None:
    made, given = network(2), losses(8, 2).double()
    made.double()
    torch.testing.assert_close(made(given * torch.tensor([1e-6, 1.0, 1e4])), made(given))
    torch.testing.assert_close(made(given + 2), made(given), rtol=0.01, atol=0.01)


def test_loss_that_is_the_same_for_all_images_tells_nothing() -> None:
    made, given = network(2), losses(8, 2)
    given[:, 1] = 12.345
    without = given.clone()
    without[:, 1] = 0
    torch.testing.assert_close(made(given), made(without), rtol=0.01, atol=0.01)


def test_single_image_is_weighed_as_if_all_its_losses_were_average() -> None:
    made = network(2)
    expected = made(torch.zeros(1, 3))
    assert torch.equal(made(losses(1, 2)), expected)
    assert expected.isfinite().all()


def test_losses_get_no_gradient() -> None:
    given = losses(4, 2).requires_grad_()
    network(2)(given)[:, 0].sum().backward()
    assert given.grad is None


def test_hidden_layer_learns_from_the_second_update_on() -> None:
    made, given = network(2, learned=False), losses(8, 2)
    optimizer = weight_optimizer(made, DynamicWeights())
    before = made.hidden.weight.detach().clone()
    wanted = torch.linspace(-1, 1, 8)[:, None] * torch.tensor([1.0, -1.0])
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        made(given).backward(gradient=wanted)
        optimizer.step()
        moved.append((made.hidden.weight.detach() - before).abs().max().item())
    # Of weight decay alone.
    assert moved[0] < 1e-6
    # Adam's second step after a first gradient of zero: (0.1/0.19) / √(0.001/0.001999) of the learning rate.
    assert moved[1] == pytest.approx(0.744e-3, rel=0.01)


def test_weights_are_kept_when_the_gradients_have_died_away() -> None:
    made, given = network(2), losses(8, 2)
    optimizer, before = weight_optimizer(made, DynamicWeights()), made(given)
    for _ in range(100):
        optimizer.zero_grad()
        made(given).backward(gradient=torch.zeros(8, 2))
        optimizer.step()
    torch.testing.assert_close(made(given), before, rtol=1e-3, atol=1e-4)


def test_optimizer_has_the_settings() -> None:
    optimizer = weight_optimizer(network(2), DynamicWeights(lr=0.02, weight_decay=0.3))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.02, 0.3)


@pytest.mark.parametrize("hints", [0, 1])
def test_single_hint_is_an_error(hints: int) -> None:
    with pytest.raises(InputError) as caught:
        WeightNetwork(hints, 10)
    assert str(caught.value) == (
        f"dynamic weights share among {hints} hint terms, but need at least 2: a single one's would always be 1; "
        "add a hint or a logit loss, or use fixed weights"
    )


def test_first_visit_gives_the_present_weights() -> None:
    history = WeightHistory(5, 2, momentum=0.9)
    weights = torch.tensor([[0.5, 1.5], [1.25, 0.75]])
    assert torch.equal(history.ensembled(torch.tensor([4, 1]), weights), weights)


def test_later_visits_mix_by_the_momentum() -> None:
    history, indices = WeightHistory(5, 2, momentum=0.75), torch.tensor([4, 1])
    history.write(indices, torch.tensor([[0.5, 1.5], [2.0, 0.0]]))
    mixed = history.ensembled(torch.tensor([1, 4, 0]), torch.tensor([[1.0, 1.0], [1.5, 0.5], [0.25, 1.75]]))
    torch.testing.assert_close(mixed, torch.tensor([[1.75, 0.25], [0.75, 1.25], [0.25, 1.75]]))


def test_result_has_mean_one_whatever_is_given() -> None:
    history, index = WeightHistory(2, 2, momentum=0.5), torch.tensor([0])
    first = history.ensembled(index, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(first, torch.tensor([[2 / 3, 4 / 3]]))
    history.write(index, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(
        history.ensembled(index, torch.tensor([[3.0, 5.0]])), torch.tensor([[2.0, 3.0]]) * (2 / 5)
    )


def test_uniform_weights_stay_ones_exactly() -> None:
    history, indices, ones = WeightHistory(3, 7, momentum=0.9), torch.arange(3), torch.ones(3, 7)
    for _ in range(3):
        used = history.ensembled(indices, ones)
        assert torch.equal(used, ones)
        history.write(indices, used)


def test_nothing_is_written_before_it_is_said() -> None:
    history = WeightHistory(3, 2, momentum=0.9)
    before = {name: value.clone() for name, value in history.state_dict().items()}
    history.ensembled(torch.tensor([0, 2]), torch.tensor([[0.5, 1.5], [1.5, 0.5]]))
    assert all(torch.equal(value, before[name]) for name, value in history.state_dict().items())


def test_result_has_no_gradient_history() -> None:
    history, weights = WeightHistory(3, 2, momentum=0.9), torch.ones(1, 2, requires_grad=True)
    assert not history.ensembled(torch.tensor([0]), weights * 1).requires_grad


def test_without_momentum_the_present_weights_are_used() -> None:
    history, index = WeightHistory(2, 2, DynamicWeights(ensemble=False).history_momentum), torch.tensor([1])
    history.write(index, torch.tensor([[0.0, 2.0]]))
    weights = torch.tensor([[1.75, 0.25]])
    assert torch.equal(history.ensembled(index, weights), weights)


def test_restored_history_goes_on_as_the_saved_one() -> None:
    generator = torch.Generator().manual_seed(0)
    visits = [torch.randperm(60, generator=generator)[:5] for _ in range(9)]
    given = [torch.rand(5, 3, generator=generator) for _ in range(9)]

    def go_on(history: WeightHistory, steps: range) -> WeightHistory:
        for step in steps:
            history.write(visits[step], history.ensembled(visits[step], given[step]))
        return history

    straight = go_on(WeightHistory(60, 3, 0.9), range(9))
    resumed = WeightHistory(60, 3, 0.9)
    for part in (range(2), range(2, 5), range(5, 9)):
        file = io.BytesIO()
        torch.save(go_on(resumed, part).state_dict(), file)
        file.seek(0)
        resumed = WeightHistory(60, 3, 0.9)
        resumed.load_state_dict(torch.load(file))
    assert 0 < straight.seen.sum() < 45
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
