from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hintsearch.distill.batches import Batch
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hinted_student import HintedStudent
from hintsearch.distill.logit_losses import LOGIT_LOSSES
from hintsearch.distill.losses import HINT_LOSSES
from hintsearch.distill.teacher_pass import TeacherOutputs, TeacherPass
from hintsearch.models.errors import InputError
from hintsearch.models.folding import frozen
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IMAGE = (1, 8, 8)
LAYERS = ("layer3.0", "bn1", "layer1.0", "conv1")
FOLDED, PLAIN = Execution(), Execution(fold_teacher=False)


class Step(nn.Module):
    """A convolution that says by which name it ran; the names are shared by all copies of it."""

    ran: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.conv = name, nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        Step.ran[self.name] += 1
        found: Tensor = self.conv(x)
        return found


class Loop(nn.Module):
    """Runs `first`, `second`, `first` again, and `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Step("first"), Step("second"), Step("last")

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(self.second(self.first(x)))
        logits: Tensor = self.last(made)
        return logits.flatten(1)


@pytest.fixture
def ran() -> Iterator[Counter[str]]:
    """How often each `Step` ran."""
    Step.ran.clear()
    yield Step.ran
    Step.ran.clear()


@torch.no_grad()
def by_hand(teacher: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every layer of a frozen copy gives, and `logits`, by a plain forward pass."""
    network = frozen(teacher)
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if path:
            module.register_forward_hook(
                lambda _module, _inputs, output, path=path: found.update({path: output.clone()})
            )
    found["logits"] = network(images)
    return found


def taught(teacher: nn.Module, images: Tensor, layers: tuple[str, ...] = LAYERS, **changes: Any) -> TeacherOutputs:
    return TeacherPass(teacher, layers, True, IMAGE, Execution(**changes))(images)


@pytest.mark.parametrize("fold", [True, False])
def test_logits_and_features_are_those_of_a_plain_pass(teacher: nn.Module, batches: list[Batch], fold: bool) -> None:
    found = taught(teacher, batches[0].images, fold_teacher=fold)
    expected = by_hand(teacher, batches[0].images)
    assert found.logits is not None
    assert tuple(found.features) == LAYERS
    for name, ours in {"logits": found.logits, **found.features}.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(ours, expected[name], rtol=1e-5, atol=1e-5 * largest)


class NormsCounted(TorchDispatchMode):
    """Counts batch-norm operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "batch_norm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fold", "left"), [(True, 0), (False, 9)])
def test_folded_teacher_computes_no_batch_norm(teacher: nn.Module, batches: list[Batch], fold: bool, left: int) -> None:
    teacher_pass = TeacherPass(teacher, ("layer1.0",), True, IMAGE, Execution(fold_teacher=fold))
    with NormsCounted() as norms:
        teacher_pass(batches[0].images)
    assert norms.count == left


@pytest.mark.parametrize("name", HINT_LOSSES.names())
def test_hint_loss_is_the_same_of_a_folded_teacher(teacher: nn.Module, batches: list[Batch], name: str) -> None:
    values = []
    for fold in (True, False):
        pairs = tuple(HintPair(layer, layer, name, 1.0) for layer in ("layer1.0", "layer2.0"))
        with torch.random.fork_rng():
            torch.manual_seed(2)
            student = build_model(ModelSpec("resnet8", 3, 1, width=0.25))
            whole = HintedStudent(student, HintConfiguration(pairs), teacher, IMAGE, labels=torch.arange(60) % 3)
        outputs = taught(teacher, batches[0].images, whole.teacher_layers, fold_teacher=fold)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            values.append(whole.terms(batches[0], outputs).hints)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LOGIT_LOSSES.names())
def test_logit_loss_is_the_same_of_a_folded_teacher(teacher: nn.Module, batches: list[Batch], name: str) -> None:
    student = torch.randn(len(batches[0].labels), 3, generator=torch.Generator().manual_seed(1))
    values = []
    for fold in (True, False):
        logits = taught(teacher, batches[0].images, (), fold_teacher=fold).logits
        assert logits is not None
        values.append(LOGIT_LOSSES.get(name)(student, logits, batches[0].labels, 4.0).mean().item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_logits_are_left_out_where_they_are_not_needed(teacher: nn.Module, batches: list[Batch]) -> None:
    found = TeacherPass(teacher, ("layer1.0",), False, IMAGE, FOLDED)(batches[0].images)
    assert found.logits is None
    assert list(found.features) == ["layer1.0"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # A layer that runs twice counts by its last run.
        (("first",), {"first": 2, "second": 1}),
        (("second",), {"first": 1, "second": 1}),
        (("first", "second"), {"first": 2, "second": 1}),
        (("second", "first"), {"first": 2, "second": 1}),
        (("second", "last"), {"first": 2, "second": 1, "last": 1}),
    ],
)
def test_pass_ends_after_the_last_layer_that_is_read(
    ran: Counter[str], layers: tuple[str, ...], expected: dict[str, int]
) -> None:
    network, images = Loop(), torch.randn(2, *IMAGE)
    teacher_pass = TeacherPass(network, layers, False, IMAGE, FOLDED)
    for _ in range(2):
        ran.clear()
        found = teacher_pass(images)
        assert dict(ran) == expected
    plain = by_hand(network, images)
    for layer in layers:
        torch.testing.assert_close(found.features[layer], plain[layer])


def test_whole_network_runs_where_logits_are_needed(ran: Counter[str]) -> None:
    teacher_pass = TeacherPass(Loop(), ("second",), True, IMAGE, FOLDED)
    ran.clear()
    teacher_pass(torch.randn(2, *IMAGE))
    assert dict(ran) == {"first": 2, "second": 1, "last": 1}


def test_layer_that_is_read_twice_is_given_once(teacher: nn.Module, batches: list[Batch]) -> None:
    assert list(taught(teacher, batches[0].images, ("bn1", "bn1")).features) == ["bn1"]


def test_outputs_can_be_part_of_a_loss(teacher: nn.Module, batches: list[Batch]) -> None:
    found = taught(teacher, batches[0].images)
    assert found.logits is not None
    for tensor in (found.logits, *found.features.values()):
        student = torch.ones_like(tensor, requires_grad=True)
        # The gradient of a product needs the other factor to be kept.
        (student * tensor).sum().backward()
        assert student.grad is not None
        assert torch.equal(student.grad, tensor)
        assert not tensor.requires_grad


@pytest.mark.parametrize("needs_logits", [True, False])
def test_features_are_from_before_a_later_layer_writes_over_them(needs_logits: bool) -> None:
    # Seeded, for some networks give nothing negative.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten())
        images = torch.randn(2, *IMAGE)
    with torch.no_grad():
        expected = network[0](images)
    layers = ("0",) if needs_logits else ("0", "1")
    found = TeacherPass(network, layers, needs_logits, IMAGE, FOLDED)(images)
    assert float(expected.min()) < 0
    torch.testing.assert_close(found.features["0"], expected)


def test_later_pass_leaves_what_an_earlier_one_gave(teacher: nn.Module, batches: list[Batch]) -> None:
    teacher_pass = TeacherPass(teacher, LAYERS, True, IMAGE, FOLDED)
    first = teacher_pass(batches[0].images)
    before = {name: feature.clone() for name, feature in first.features.items()}
    teacher_pass(batches[1].images)
    assert all(torch.equal(feature, before[name]) for name, feature in first.features.items())


@pytest.mark.parametrize("fold", [True, False])
def test_features_in_bf16_are_float32_and_near_the_exact_ones(
    teacher: nn.Module, batches: list[Batch], fold: bool
) -> None:
    exact = by_hand(teacher, batches[0].images)
    found = taught(teacher, batches[0].images, fold_teacher=fold, precision="bf16")
    assert found.logits is not None
    for name, ours in {"logits": found.logits, **found.features}.items():
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, exact[name])
        # Eight bits of mantissa, over the depth of the network.
        assert (ours - exact[name]).norm() < 0.02 * exact[name].norm()


def test_weights_kept_in_bf16_change_nothing(teacher: nn.Module, batches: list[Batch]) -> None:
    with Execution(precision="bf16").autocast():
        expected = by_hand(teacher, batches[0].images)
    found = taught(teacher, batches[0].images, fold_teacher=False, precision="bf16")
    assert all(torch.equal(feature, expected[name].float()) for name, feature in found.features.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("needs_logits", [True, False])
def test_given_teacher_is_left_as_it_was(
    teacher: nn.Module, batches: list[Batch], needs_logits: bool, precision: str
) -> None:
    before = weights_sha256(teacher.state_dict())
    TeacherPass(teacher, LAYERS, needs_logits, IMAGE, Execution(precision=precision))(batches[0].images)
    assert weights_sha256(teacher.state_dict()) == before
    assert teacher.get_submodule("relu").inplace
    assert all(module.training and not module._forward_hooks for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("execution", [FOLDED, PLAIN], ids=["folded", "plain"])
@pytest.mark.parametrize("needs_logits", [True, False])
def test_unknown_layer_is_an_error_naming_the_nearest(
    teacher: nn.Module, needs_logits: bool, execution: Execution
) -> None:
    with pytest.raises(InputError, match=r"has no layer 'layer4.0'; did you mean 'layer"):
        TeacherPass(teacher, ("layer4.0",), needs_logits, IMAGE, execution)


@pytest.mark.parametrize("layers", [("aside",), ("first", "aside")])
def test_layer_that_does_not_run_is_an_error(layers: tuple[str, ...]) -> None:
    network = Loop()
    network.aside = nn.Conv2d(1, 1, 1)
    with pytest.raises(InputError, match="the layer 'aside' did not run in the forward pass"):
        TeacherPass(network, layers, False, IMAGE, FOLDED)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("layers", [("bn1:input", "fc:input"), ("layer2.0.relu:input",), ("layer1.0.bn2:input",)])
def test_what_a_layer_is_given_is_that_of_a_plain_pass(
    teacher: nn.Module, batches: list[Batch], layers: tuple[str, ...], fold: bool
) -> None:
    given: dict[str, Tensor] = {}
    network = frozen(teacher)
    for path in layers:
        network.get_submodule(path.removesuffix(":input")).register_forward_pre_hook(
            lambda _module, inputs, path=path: given.update({path: inputs[0].clone()})
        )
    with torch.no_grad():
        network(batches[0].images)
    for needs_logits in (True, False):
        teacher_pass = TeacherPass(teacher, layers, needs_logits, IMAGE, Execution(fold_teacher=fold))
        found = teacher_pass(batches[0].images).features
        assert tuple(found) == layers
        for path in layers:
            expected = given[path][:, :, None, None] if given[path].dim() == 2 else given[path]
            torch.testing.assert_close(found[path], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("first:input",), {"first": 2, "second": 1}),
        (("second:input",), {"first": 1, "second": 1}),
        (("second:input", "second"), {"first": 1, "second": 1}),
        (("last:input", "first"), {"first": 2, "second": 1, "last": 1}),
    ],
)
def test_pass_ends_after_the_last_layer_whose_input_is_read(
    ran: Counter[str], layers: tuple[str, ...], expected: dict[str, int]
) -> None:
    network, images = Loop(), torch.randn(2, *IMAGE)
    teacher_pass = TeacherPass(network, layers, False, IMAGE, FOLDED)
    ran.clear()
    found = teacher_pass(images)
    assert dict(ran) == expected
    plain = by_hand(network, images)
    # What each layer is given is what the one before it gives, in its last run.
    before = {"second:input": network.first(images), "last:input": plain["first"], "first:input": plain["second"]}
    for layer in layers:
        torch.testing.assert_close(found.features[layer], {**plain, **before}[layer])


def test_pass_that_ends_before_the_classifier_does_not_run_it() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3))
    images = torch.randn(2, *IMAGE)
    # An activation in place: what it is given is read before it writes over it.
    found = TeacherPass(network, ("1:input", "1"), False, IMAGE, FOLDED)(images).features
    with torch.no_grad():
        expected = network[0](images)
    assert float(expected.min()) < 0
    torch.testing.assert_close(found["1:input"], expected)
    torch.testing.assert_close(found["1"], expected.clamp(min=0))
