import numpy as np
import pytest
import torch
from golden_losses import GOLDEN
from hint_cases import Array, features, make_joint_loss, run_parts, tensors, value
from hintsearch.distill.joint_losses import ReviewKD
from hintsearch.distill.losses import FeatureShape
from torch import Tensor, nn

# Channels and sizes of a student's and a teacher's layers, from shallow to deep.
LAYERS = {
    "one": ([(3, 4, 4)], [(5, 4, 4)]),
    "shrinking": ([(2, 8, 8), (3, 4, 4), (4, 2, 2)], [(3, 8, 8), (5, 4, 4), (2, 2, 2)]),
    "growing": ([(2, 2, 2), (3, 4, 4), (4, 8, 8)], [(3, 2, 2), (5, 4, 4), (2, 8, 8)]),
    "other sizes": ([(2, 6, 6), (3, 3, 2), (4, 4, 4)], [(3, 4, 8), (3, 6, 6), (6, 2, 1)]),
}


def drawn(shapes: list[tuple[int, int, int]], seed: int, batch: int = 3) -> list[Array]:
    return [features((batch, *shape), seed + depth) for depth, shape in enumerate(shapes)]


def gram(feature: Array) -> Array:
    """Of the channels, mean over the pixels; [C, H, W] → [C, C]."""
    flat = feature.reshape(len(feature), -1)
    products: Array = flat @ flat.T / flat.shape[1]
    return products


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ["fsp", "reviewkd"])
def test_joint_loss_of_any_number_of_pairs_is_its_formula(
    name: str, layers: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]
) -> None:
    students, teachers = drawn(layers[0], 1), drawn(layers[1], 11)
    loss = make_joint_loss(name, students, teachers)
    assert value(loss, students, teachers) == pytest.approx(GOLDEN[name](loss, students, teachers), rel=1e-12)


def test_fsp_of_a_single_pair_compares_the_gram_matrices_of_the_channels() -> None:
    student, teacher = features((3, 4, 5, 5), 1), features((3, 4, 2, 2), 2)
    loss = make_joint_loss("fsp", [student], [teacher])
    expected = np.mean([(gram(ours) - gram(theirs)) ** 2 for ours, theirs in zip(student, teacher, strict=True)])
    assert value(loss, [student], [teacher]) == pytest.approx(expected, rel=1e-12)


def test_fsp_is_the_sum_over_the_flows_between_consecutive_layers() -> None:
    shapes = [(2, 6, 6), (4, 6, 6), (3, 3, 3), (3, 3, 3)]
    students, teachers = drawn(shapes, 1), drawn(shapes, 11)

    def of(first: int, last: int) -> float:
        ours, theirs = students[first:last], teachers[first:last]
        return value(make_joint_loss("fsp", ours, theirs), ours, theirs)

    assert of(0, 4) == pytest.approx(of(0, 2) + of(1, 3) + of(2, 4), rel=1e-12)


def test_fsp_has_a_closed_form() -> None:
    """The mean over the pixels of each product: of 2·3 and of 2·(-1) in the student, of 1·1 twice in the teacher."""
    shallow, deep = np.full((1, 1, 4, 4), 2.0), np.array([3.0, -1.0]).reshape(1, 2, 1, 1)
    ones = [np.ones_like(shallow), np.ones_like(deep)]
    loss = make_joint_loss("fsp", [shallow, deep], ones)
    assert value(loss, [shallow, deep], ones) == (5**2 + 3**2) / 2


def test_fsp_trains_convolutions_only_where_the_channels_differ() -> None:
    students, teachers = drawn([(3, 4, 4), (4, 4, 4)], 1), drawn([(3, 4, 4), (5, 2, 2)], 11)
    names = [name for name, _ in make_joint_loss("fsp", students, teachers).named_parameters()]
    assert names == ["regressors.1.weight", "regressors.1.bias"]


def test_reviewkd_is_zero_where_what_is_reviewed_is_the_teachers_and_so_is_its_gradient() -> None:
    students, teachers = drawn(LAYERS["shrinking"][0], 1), drawn(LAYERS["shrinking"][1], 11)
    loss = make_joint_loss("reviewkd", students, teachers)
    assert value(loss, students, teachers) > 0
    reviewed = [feature.clone().requires_grad_() for feature in tensors(teachers)]
    found = loss.compare(reviewed, tensors(teachers))
    gradients = torch.autograd.grad(found.sum(), reviewed)
    assert found.tolist() == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients)


def test_reviewkd_hands_features_from_deep_to_shallow_layers_only() -> None:
    layers = LAYERS["shrinking"]
    students = [feature.requires_grad_() for feature in tensors(drawn(layers[0], 1))]
    loss = make_joint_loss("reviewkd", drawn(layers[0], 1), drawn(layers[1], 11))
    reviewed, _ = loss.adapt(students, tensors(drawn(layers[1], 11)))
    reach = []
    for output in reviewed:
        weights = torch.from_numpy(features(tuple(output.shape), 5))
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            (output * weights).sum(), students, retain_graph=True, allow_unused=True
        )
        reach.append([gradient is not None and bool(gradient.any()) for gradient in gradients])
    assert reach == [[True, True, True], [False, True, True], [False, False, True]]


def test_reviewkd_learns_to_be_nearer() -> None:
    students, teachers = drawn(LAYERS["shrinking"][0], 1), drawn(LAYERS["shrinking"][1], 11)
    loss = make_joint_loss("reviewkd", students, teachers)
    before = run_parts(loss, tensors(students), tensors(teachers)).mean()
    before.backward()
    with torch.no_grad():
        for weights in loss.parameters():
            assert weights.grad is not None
            weights.sub_(1e-3 * weights.grad)
    assert run_parts(loss, tensors(students), tensors(teachers)).mean() < before


@pytest.mark.parametrize(("deepest", "handed_on"), [(3, 3), (600, 512)])
def test_reviewkd_hands_on_as_many_channels_as_the_deepest_layer_has_up_to_512(deepest: int, handed_on: int) -> None:
    loss = ReviewKD([FeatureShape(2, 4, 4), FeatureShape(deepest, 2, 2)], [FeatureShape(1, 4, 4)] * 2)
    assert loss.get_parameter("fusions.0.enter.0.weight").shape == (handed_on, 2, 1, 1)
    assert loss.get_parameter("fusions.1.leave.0.weight").shape == (1, handed_on, 3, 3)


def test_reviewkd_begins_with_the_weights_of_the_paper() -> None:
    """Uniform, with a variance of one over what comes into a value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = ReviewKD([FeatureShape(64, 4, 4)], [FeatureShape(32, 4, 4)])
    for name, inputs in (("enter", 64), ("leave", 9 * 64)):
        weight = loss.get_parameter(f"fusions.0.{name}.0.weight").detach()
        assert weight.abs().max().item() == pytest.approx((3 / inputs) ** 0.5, rel=0.01)
        assert weight.std().item() == pytest.approx(inputs**-0.5, rel=0.03)


def test_reviewkd_of_a_single_pair_has_no_attention() -> None:
    students, teachers = drawn(LAYERS["one"][0], 1), drawn(LAYERS["one"][1], 11)
    assert not any(isinstance(m, nn.Sigmoid) for m in make_joint_loss("reviewkd", students, teachers).modules())
