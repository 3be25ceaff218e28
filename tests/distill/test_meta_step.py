from dataclasses import replace

import pytest
import torch
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.meta_step import MetaStep, WeightedLosses
from hintsearch.distill.weight_network import WeightHistory, WeightNetwork, weight_optimizer
from small_student import (
    Hint,
    Lesson,
    attention,
    distances,
    distances_written_out,
    divergence,
    doubted,
    is_as_it_was,
    lesson,
    regression,
    similarity,
    state_of,
)
from torch import Tensor, nn
from torch.nn import functional

HINTS = (divergence, doubted, attention, regression, similarity)
LR = 0.3
SCALES = torch.tensor([0.5, 1.0, 3.0, 2.0, 0.7], dtype=torch.float64)


def weight_network() -> WeightNetwork:
    """One that has learned something."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = WeightNetwork(len(HINTS), hidden=4)
        nn.init.normal_(network.last.weight)
        nn.init.normal_(network.last.bias)
        return network.double()


def loss_columns(given: Lesson) -> Tensor:
    """[B, 1 + hints]."""
    return torch.cat([given.cross_entropies()[:, None], given.hints(*HINTS)], dim=1)


def weighted(given: Lesson) -> WeightedLosses:
    losses = loss_columns(given)
    return WeightedLosses(losses[:, 0].mean(), losses[:, 1:], SCALES)


def meta_lesson(given: Lesson) -> Lesson:
    """The same student on other images."""
    generator = torch.Generator().manual_seed(6)
    return replace(given, images=torch.randn(given.images.shape, generator=generator, dtype=given.images.dtype))


def meta_step(given: Lesson, losses: WeightedLosses, weights: Tensor) -> Tensor:
    return MetaStep(given.whole)(
        losses, weights, LR, lambda: given.hints(*HINTS), lambda: meta_lesson(given).cross_entropies().mean()
    )


def meta_loss_by_hand(weights: Tensor) -> Tensor:
    """Of a student that really makes the step."""
    given = lesson()
    losses = loss_columns(given)
    (losses[:, 0] + (SCALES * weights.detach() * losses[:, 1:]).sum(dim=1)).mean().backward()
    with torch.no_grad():
        for parameter in given.whole.parameters():
            parameter -= LR * parameter.grad
    return meta_lesson(given).cross_entropies().mean().detach()


def test_gradient_of_the_network_is_that_of_the_whole_pipeline() -> None:
    given, network = lesson(), weight_network()
    columns = loss_columns(given).detach()
    meta_step(given, weighted(given), network(columns))
    h = 1e-5
    for parameter in network.parameters():
        flat, found = parameter.data.view(-1), parameter.grad
        assert found is not None
        expected = torch.empty_like(flat)
        for place in range(len(flat)):
            here = flat[place].item()
            ends = []
            for moved in (here + h, here - h):
                flat[place] = moved
                ends.append(meta_loss_by_hand(network(columns)))
            flat[place] = here
            expected[place] = (ends[0] - ends[1]) / (2 * h)
        assert expected.norm() > 1e-5
        torch.testing.assert_close(found.view(-1), expected, rtol=1e-6, atol=1e-6 * expected.norm().item())


def test_gradient_of_a_weight_is_the_agreement_of_the_two_gradients() -> None:
    """By the formula, one image and hint at a time."""
    given = lesson()
    weights = torch.rand(5, len(HINTS), dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.5
    weights.requires_grad_()
    meta_step(given, weighted(given), weights)

    other = lesson()
    losses, parameters = weighted(other), list(other.whole.parameters())
    slopes = torch.autograd.grad(losses.total(weights), parameters, retain_graph=True)
    of_image = torch.autograd.grad(losses.hints[2, 3], parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter -= LR * slope
    of_meta = torch.autograd.grad(meta_lesson(other).cross_entropies().mean(), parameters, allow_unused=True)
    agreement = sum((a * b).sum() for a, b in zip(of_image, of_meta, strict=True) if a is not None and b is not None)
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad[2, 3], -LR * SCALES[3] / 5 * agreement)


def test_meta_loss_is_that_after_the_virtual_step() -> None:
    given, weights = lesson(), weight_network()(torch.rand(5, 1 + len(HINTS), dtype=torch.float64))
    loss = meta_step(given, weighted(given), weights)
    torch.testing.assert_close(loss, meta_loss_by_hand(weights))
    assert not loss.requires_grad


def test_student_is_left_as_it_was() -> None:
    given = lesson()
    losses = weighted(given)
    before = state_of(given.whole)
    meta_step(given, losses, weight_network()(loss_columns(lesson())))
    assert is_as_it_was(given.whole, before)


@pytest.mark.parametrize("place", ["meta loss", "hints"])
def test_student_is_left_as_it_was_when_a_pass_fails(place: str) -> None:
    given = lesson()
    losses = weighted(given)
    before = state_of(given.whole)

    def fail() -> Tensor:
        given.whole.outputs(given.images)
        raise RuntimeError("in the middle")

    hints = fail if place == "hints" else lambda: given.hints(*HINTS)
    meta = fail if place == "meta loss" else lambda: given.cross_entropies().mean()
    weights = weight_network()(loss_columns(lesson()))
    with pytest.raises(RuntimeError, match="in the middle"):
        MetaStep(given.whole)(losses, weights, LR, hints, meta)
    assert is_as_it_was(given.whole, before)


def test_real_step_goes_on_with_the_same_graph() -> None:
    given, fresh = lesson(), lesson()
    losses, used = weighted(given), torch.full((5, len(HINTS)), 1.25, dtype=torch.float64)
    meta_step(given, losses, weight_network()(loss_columns(lesson())))
    losses.total(used).backward()
    weighted(fresh).total(used).backward()
    for found, expected in zip(given.whole.parameters(), fresh.whole.parameters(), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


def test_ones_are_fixed_weights() -> None:
    losses = weighted(lesson())
    fixed = losses.rest + (SCALES * losses.hints.mean(dim=0)).sum()
    torch.testing.assert_close(losses.total(torch.ones_like(losses.hints)), fixed)


def test_gradients_of_the_network_add_up() -> None:
    given, network = lesson(), weight_network()
    columns = loss_columns(given).detach()
    once = []
    for _ in range(2):
        meta_step(given, weighted(given), network(columns))
        once.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    for first, both in zip(*once, strict=True):
        torch.testing.assert_close(both, 2 * first)


def test_frozen_parameters_do_not_move_in_the_virtual_step() -> None:
    given, still = lesson(), lesson()
    weights = torch.ones(5, len(HINTS), dtype=torch.float64, requires_grad=True)
    given.whole.student.requires_grad_(False)
    given.whole.student.fc.requires_grad_(True)
    slope = torch.autograd.grad(weighted(still).total(weights), list(still.whole.student.fc.parameters()))
    with torch.no_grad():
        for parameter, by in zip(still.whole.student.fc.parameters(), slope, strict=True):
            parameter -= LR * by
    loss = meta_step(given, weighted(given), weights)
    torch.testing.assert_close(loss, meta_lesson(still).cross_entropies().mean().detach())
    assert weights.grad is not None
    # The early map is no longer trained: neither its attention nor the adapter can change the meta loss.
    assert weights.grad[:, 0].all()
    assert not weights.grad[:, 2:4].any()


def test_difference_in_place_of_forward_mode_gives_the_same_gradient() -> None:
    def gradient(hint: Hint) -> Tensor:
        given, weights = lesson(), torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
        losses = WeightedLosses(given.cross_entropies().mean(), given.hints(divergence, hint), SCALES[:2])
        again, meta = lambda: given.hints(divergence, hint), lambda: meta_lesson(given).cross_entropies().mean()
        MetaStep(given.whole)(losses, weights, LR, again, meta)
        assert weights.grad is not None
        return weights.grad

    torch.testing.assert_close(gradient(distances), gradient(distances_written_out), rtol=1e-4, atol=1e-9)


@pytest.fixture(scope="module")
def course() -> Tensor:
    """Mean weights [80 steps, 2] of a student of true and of random targets, each step with a meta step."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(320, 12, generator=generator)
    true = 3 * images @ torch.randn(12, 4, generator=generator) / 12**0.5
    targets = torch.stack([true, 3 * torch.randn(320, 4, generator=generator)])
    labels = true.argmax(dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        student = nn.Sequential(
            nn.Linear(12, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(inplace=True), nn.Linear(24, 4)
        )
        network = WeightNetwork(2, hidden=20)
    settings = DynamicWeights(lr=0.01)
    meta_step = MetaStep(student)
    lr = 0.05
    learning, optimizer = torch.optim.SGD(student.parameters(), lr), weight_optimizer(network, settings)
    history = WeightHistory(256, 2, settings.history_momentum)
    scales, means = torch.ones(2), []
    for _ in range(80):
        batch = torch.randint(256, (32,), generator=generator).unique()
        meta = torch.randint(256, 320, (64,), generator=generator)

        def hints(logits: Tensor, batch: Tensor = batch) -> Tensor:
            said = functional.log_softmax(logits, dim=1).expand(2, -1, -1)
            wanted = functional.log_softmax(targets[:, batch], dim=2)
            return functional.kl_div(said, wanted, reduction="none", log_target=True).sum(dim=2).t()

        logits = student(images[batch])
        entropies = functional.cross_entropy(logits, labels[batch], reduction="none")
        losses = WeightedLosses(entropies.mean(), hints(logits), scales)
        weights = network(torch.cat([entropies[:, None], losses.hints], dim=1))
        means.append(weights.detach().mean(dim=0))
        optimizer.zero_grad()
        meta_step(
            losses,
            weights,
            lr,
            lambda batch=batch, hints=hints: hints(student(images[batch])),
            lambda meta=meta: functional.cross_entropy(student(images[meta]), labels[meta]),
        )
        optimizer.step()
        used = history.ensembled(batch, weights)
        learning.zero_grad()
        losses.total(used).backward()
        learning.step()
        history.write(batch, used)
    return torch.stack(means)


def test_hint_of_random_targets_loses_weight_and_a_true_one_gains(course: Tensor) -> None:
    assert torch.equal(course[0], torch.ones(2))
    true, random = course.unbind(dim=1)
    quarters = [random[start : start + 20].mean() for start in (0, 20, 40, 60)]
    assert quarters == sorted(quarters, reverse=True)
    assert quarters[-1] < 0.5
    assert true[-20:].mean() > 1.5
