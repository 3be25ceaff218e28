import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hintsearch.distill.directional import DirectionalDerivative
from small_student import (
    Hint,
    Lesson,
    attention,
    direction,
    distances,
    divergence,
    doubted,
    is_as_it_was,
    kernel,
    lesson,
    regression,
    similarity,
    state_of,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

HINTS = (divergence, doubted, attention, regression, similarity, kernel)


def image_by_image(given: Lesson, hints: tuple[Hint, ...], along: Mapping[str, Tensor]) -> Tensor:
    """Inner products with the gradient of each loss of each image, one backward pass each."""
    losses = given.hints(*hints)
    parameters = dict(given.whole.named_parameters())

    def product(loss: Tensor) -> Tensor:
        slopes = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(parameters, slopes, strict=True)
        return torch.stack([(slope * along[name]).sum() for name, slope in pairs if slope is not None]).sum()

    return torch.stack([torch.stack([product(loss) for loss in row]) for row in losses])


@pytest.mark.parametrize("hint", HINTS)
def test_derivatives_are_inner_products_with_the_gradients_of_each_image(hint: Hint) -> None:
    given = lesson()
    along = direction(given.whole)
    found = DirectionalDerivative(given.whole)(lambda: given.hints(hint), along)
    expected = image_by_image(given, (hint,), along)
    assert found.shape == (5, 1)
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_hints_are_differentiated_together() -> None:
    given = lesson()
    along = direction(given.whole)
    found = DirectionalDerivative(given.whole)(lambda: given.hints(*HINTS), along)
    torch.testing.assert_close(found, image_by_image(given, HINTS, along), rtol=1e-9, atol=1e-12)


def test_parameters_without_direction_do_not_move() -> None:
    given = lesson()
    along = direction(given.whole)
    derivative = DirectionalDerivative(given.whole)
    part = {"student.conv1.weight": along["student.conv1.weight"]}
    rest = {name: tangent for name, tangent in along.items() if name not in part}
    apart = [derivative(lambda: given.hints(*HINTS), some) for some in (part, rest)]
    torch.testing.assert_close(apart[0] + apart[1], derivative(lambda: given.hints(*HINTS), along))
    adapter = {name: tangent for name, tangent in along.items() if name.startswith("adapter")}
    assert not derivative(lambda: given.hints(attention), adapter).any()
    assert derivative(lambda: given.hints(regression), adapter).all()


@pytest.mark.parametrize("hints", [HINTS, (*HINTS, distances)], ids=["forward mode", "difference"])
def test_module_is_left_as_it_was(hints: tuple[Hint, ...]) -> None:
    given = lesson()
    before = state_of(given.whole)
    found = DirectionalDerivative(given.whole)(lambda: given.hints(*hints), direction(given.whole))
    assert not found.requires_grad
    assert is_as_it_was(given.whole, before)


def test_operation_without_forward_mode_is_differentiated_by_a_difference(caplog: pytest.LogCaptureFixture) -> None:
    given = lesson()
    hints, along = (divergence, attention, distances), direction(given.whole)
    with caplog.at_level(logging.INFO, "hintsearch.distill"):
        found = DirectionalDerivative(given.whole)(lambda: given.hints(*hints), along)
    torch.testing.assert_close(found, image_by_image(given, hints, along), rtol=1e-4, atol=1e-6)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "_cdist_forward" in caplog.text


def test_difference_in_float32_is_near_the_derivative() -> None:
    given, exactly = lesson(torch.float32), lesson(torch.float64)
    hints = (divergence, attention, distances)
    found = DirectionalDerivative(given.whole)(lambda: given.hints(*hints), direction(given.whole))
    expected = image_by_image(exactly, hints, {n: t.double() for n, t in direction(given.whole).items()})
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_difference_does_not_depend_on_the_length_of_the_direction(factor: float) -> None:
    given = lesson()
    along = direction(given.whole)
    derivative = DirectionalDerivative(given.whole)
    once = derivative(lambda: given.hints(distances), along)
    scaled = derivative(lambda: given.hints(distances), {name: factor * tangent for name, tangent in along.items()})
    torch.testing.assert_close(scaled, factor * once, rtol=1e-6, atol=0)


def test_difference_along_nothing_is_nothing() -> None:
    given = lesson(torch.float32)
    still = {name: torch.zeros_like(tangent) for name, tangent in direction(given.whole).items()}
    assert not DirectionalDerivative(given.whole)(lambda: given.hints(distances), still).any()


def test_forward_mode_is_tried_once_and_its_want_said_once(caplog: pytest.LogCaptureFixture) -> None:
    given = lesson()
    derivative, along = DirectionalDerivative(given.whole), direction(given.whole)
    passes = []

    def losses() -> Tensor:
        passes.append(1)
        return given.hints(distances)

    for _ in range(3):
        derivative(losses, along)
    assert len(passes) == 1 + 3 * 2
    assert len(caplog.records) == 1


def test_difference_has_the_same_dropout_in_both_passes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(13)
        module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    images, other = torch.ones(4, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    along = direction(module)
    state = torch.get_rng_state()
    found = DirectionalDerivative(module)(lambda: torch.cdist(module(images), other), along)
    torch.set_rng_state(state)
    losses = torch.cdist(module(images), other)
    for loss, derivative in zip(losses, found, strict=True):
        slopes = torch.autograd.grad(loss.sum(), list(module.parameters()), retain_graph=True)
        expected = sum((s * t).sum() for s, t in zip(slopes, along.values(), strict=True))
        torch.testing.assert_close(derivative.sum(), expected, rtol=1e-4, atol=1e-6)


def test_forward_mode_works_under_autocast() -> None:
    given = lesson(torch.float32, images=16)
    hints = (divergence, attention, regression, similarity)
    along, derivative = direction(given.whole), DirectionalDerivative(given.whole)
    exact = derivative(lambda: given.hints(*hints), along)
    rounded = derivative(lambda: given.hints(*hints, bf16=True), along)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).norm(dim=0) < 0.05 * exact.norm(dim=0)).all()


@pytest.mark.parametrize("hint", [divergence, distances], ids=["forward mode", "difference"])
def test_autocast_around_the_call_is_off(hint: Hint) -> None:
    given = lesson(torch.float32)
    along, seen = direction(given.whole), []

    def losses() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return given.hints(hint)

    with torch.autocast("cpu", torch.bfloat16):
        DirectionalDerivative(given.whole)(losses, along)
    assert seen
    assert not any(seen)


def test_threads_differentiate_at_the_same_time() -> None:
    lessons = [lesson(), lesson()]
    along, alone = direction(lessons[0].whole), lesson()
    expected = DirectionalDerivative(alone.whole)(lambda: alone.hints(*HINTS), along)
    inside = threading.Barrier(2, timeout=10)

    def work(given: Lesson) -> Tensor:
        def losses() -> Tensor:
            inside.wait()
            found = given.hints(*HINTS)
            inside.wait()
            return found

        return DirectionalDerivative(given.whole)(losses, along)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, lessons):
            torch.testing.assert_close(found, expected)
    # The last one out has closed the level.
    with forward_ad.dual_level():
        pass


def test_error_in_a_loss_comes_through_and_the_next_call_works() -> None:
    given = lesson()
    derivative, along = DirectionalDerivative(given.whole), direction(given.whole)

    def fail() -> Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        derivative(fail, along)
    found = derivative(lambda: given.hints(divergence), along)
    torch.testing.assert_close(found, image_by_image(given, (divergence,), along))
