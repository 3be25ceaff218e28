from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hintsearch.distill.batches import Batch
from hintsearch.distill.execution import Execution
from hintsearch.distill.feature_losses import AttentionTransfer
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hinted_student import HintedStudent, Labelling, LossTerms
from hintsearch.distill.logit_losses import kd
from hintsearch.distill.losses import FeatureShape, HintLoss
from hintsearch.distill.relation_losses import SimilarityPreserving
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.nn import functional

PlainNetwork = Callable[..., nn.Sequential]

IMAGE = (1, 8, 8)
AT = HintPair("conv1", "conv1", "at", 2.0)
SP = HintPair("conv2", "conv2", "sp", 0.5)
FITNET = HintPair("conv2", "conv2", "fitnet", 3.0)
HINTS = HintConfiguration(pairs=(AT, SP), classification_weight=0.7, logit_weight=0.3, temperature=2.0)
BLOCKS = HintConfiguration(pairs=(HintPair("layer2.0", "layer1.0", "fitnet", 1.0),), logit_weight=1.0)


class Scaled(HintLoss):
    """A hint loss without adapters whose raw values are `factor` times as large."""

    def __init__(self, loss: HintLoss, factor: float) -> None:
        super().__init__(FeatureShape(1, 1, 1), FeatureShape(1, 1, 1))
        self.loss, self.factor = loss, factor

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.factor * self.loss.compare(student, teacher)


def scale(whole: HintedStudent, number: int, factor: float) -> None:
    """Makes the raw values of a student's hint term `factor` times as large."""
    term = whole.hint_terms[number]
    assert isinstance(term.loss, HintLoss)
    term.loss = Scaled(term.loss, factor)


def residual_student() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_model(ModelSpec("resnet8", 3, 1, width=0.25))


def layers_by_hand(network: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """`conv1`, `conv2` and the logits of a plain network, each computed from its weights alone."""
    weights = dict(network.named_parameters())
    first = functional.conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=1)
    second = functional.conv2d(first.clamp(min=0), weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1)
    logits = second.clamp(min=0).mean((2, 3)) @ weights["fc.weight"].t() + weights["fc.bias"]
    return {"conv1": first, "conv2": second, "logits": logits}


@dataclass
class Lesson:
    """A student with hints, and the teacher that it is taught by."""

    whole: HintedStudent
    teacher: TeacherPass

    def terms(self, batch: Batch) -> LossTerms:
        return self.whole.terms(batch, self.teacher(batch.teacher_images))

    def set_normalisers(self, batches: list[Batch]) -> None:
        self.whole.set_normalisers(batches, [self.teacher(batch.teacher_images) for batch in batches])

    def raw_hints(self, batches: list[Batch]) -> Tensor:
        return torch.stack([self.terms(batch).hints.detach() for batch in batches])


def lesson(
    student: nn.Module, hints: HintConfiguration, teacher: nn.Module, execution: Execution | None = None
) -> Lesson:
    execution = execution or Execution()
    whole = HintedStudent(student, hints, teacher, IMAGE, execution=execution)
    return Lesson(whole, TeacherPass(teacher, whole.teacher_layers, hints.logit_weight > 0, IMAGE, execution))


def error_of(hints: HintConfiguration, student: nn.Module, teacher: nn.Module | None) -> str:
    with pytest.raises(InputError) as caught:
        HintedStudent(student, hints, teacher, IMAGE)
    return str(caught.value)


def test_terms_are_the_losses_of_the_named_layers(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    student, teacher = plain_network(4), plain_network(6, seed=1)
    terms = lesson(student, HINTS, teacher).terms(batches[0])
    ours, theirs = (layers_by_hand(network, batches[0].images) for network in (student, teacher))
    shape = FeatureShape(1, 1, 1)
    at, sp = AttentionTransfer(shape, shape), SimilarityPreserving(shape, shape)
    expected = LossTerms(
        classification=functional.cross_entropy(ours["logits"], batches[0].labels),
        logit=kd(ours["logits"], theirs["logits"], batches[0].labels, 2.0).mean(),
        hints=torch.stack(
            [
                at.compare(ours["conv1"], theirs["conv1"]).mean(),
                sp.compare(ours["conv2"], theirs["conv2"]).mean(),
            ]
        ),
    )
    torch.testing.assert_close(terms.classification, expected.classification)
    torch.testing.assert_close(terms.logit, expected.logit)
    torch.testing.assert_close(terms.hints, expected.hints)


def test_total_is_the_weighted_sum_of_the_normalised_terms(plain_network: PlainNetwork) -> None:
    whole = HintedStudent(plain_network(), HINTS, plain_network(6), IMAGE)
    whole.normalisers.copy_(torch.tensor([4.0, 0.25]))
    terms = LossTerms(torch.tensor(1.5), torch.tensor(0.5), torch.tensor([3.0, 0.125]))
    expected = 0.7 * 1.5 + 0.3 * 0.5 + 2.0 * 3.0 / 4.0 + 0.5 * 0.125 / 0.25
    assert float(whole.total(terms)) == pytest.approx(expected, rel=1e-6)


def test_student_without_hints_has_the_cross_entropy_alone(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    student = plain_network()
    whole = HintedStudent(student, HintConfiguration(classification_weight=0.7), None, IMAGE)
    terms = whole.terms(batches[0])
    expected = functional.cross_entropy(layers_by_hand(student, batches[0].images)["logits"], batches[0].labels)
    assert (float(terms.logit), terms.hints.shape) == (0, (0,))
    torch.testing.assert_close(whole.total(terms), 0.7 * expected)


def test_logit_loss_of_weight_zero_is_left_out(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), replace(HINTS, logit_weight=0.0), plain_network(6))
    assert float(taught.terms(batches[0]).logit) == 0


def test_logit_loss_works_without_pairs(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), HintConfiguration(logit_weight=0.3), plain_network(6))
    terms = taught.terms(batches[0])
    torch.testing.assert_close(taught.whole.total(terms), terms.classification + 0.3 * terms.logit)


def test_pair_of_weight_zero_is_dropped(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    hints = replace(HINTS, pairs=(AT, replace(FITNET, weight=0.0), SP))
    taught = lesson(plain_network(), hints, plain_network(6))
    assert len(taught.whole.hint_terms) == 2
    assert taught.terms(batches[0]).hints.shape == (2,)


def test_dropped_pair_may_name_layers_that_do_not_exist(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    hints = replace(HINTS, pairs=(replace(AT, teacher_layer="none", student_layer="none", weight=0.0),))
    taught = lesson(plain_network(), hints, plain_network(6))
    assert taught.terms(batches[0]).hints.shape == (0,)


def test_repeated_student_layer_learns_from_each_of_its_teacher_layers(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    pairs = (replace(AT, teacher_layer="conv1"), replace(AT, teacher_layer="conv2"))
    student, teacher = plain_network(), plain_network(6)
    both = lesson(student, replace(HINTS, pairs=pairs), teacher).raw_hints(batches)
    for column, pair in enumerate(pairs):
        alone = lesson(student, replace(HINTS, pairs=(pair,)), teacher).raw_hints(batches)
        torch.testing.assert_close(both[:, column], alone[:, 0])


def test_adapter_fits_layers_of_other_channels_and_sizes(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    pair = replace(FITNET, student_layer="conv1", teacher_layer="conv2")
    taught = lesson(plain_network(4), replace(HINTS, pairs=(pair,)), plain_network(6))
    assert taught.whole.get_parameter("_terms.0.loss.regressor.weight").shape == (12, 4, 1, 1)
    assert taught.terms(batches[0]).hints.isfinite().all()


def test_normalisers_are_the_mean_raw_losses_of_the_batches(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), HINTS, plain_network(6))
    taught.set_normalisers(batches)
    torch.testing.assert_close(taught.whole.normalisers, taught.raw_hints(batches).mean(dim=0))


def test_normalisers_are_measured_in_training_mode(teacher: nn.Module, batches: list[Batch]) -> None:
    taught = lesson(residual_student(), BLOCKS, teacher)
    taught.whole.eval()
    taught.set_normalisers(batches)
    measured = taught.whole.normalisers.clone()
    assert not torch.allclose(measured, taught.raw_hints(batches).mean(dim=0), rtol=1e-2)
    taught.whole.train()
    torch.testing.assert_close(measured, taught.raw_hints(batches).mean(dim=0))


def test_normalisers_do_not_depend_on_those_before(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), HINTS, plain_network(6))
    taught.set_normalisers(batches)
    before = taught.whole.normalisers.clone()
    taught.set_normalisers(batches)
    assert torch.equal(taught.whole.normalisers, before)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
def test_raw_size_of_a_loss_does_not_change_its_normalised_term(
    plain_network: PlainNetwork, batches: list[Batch], factor: float
) -> None:
    plain, scaled = (lesson(plain_network(), HINTS, plain_network(6)) for _ in range(2))
    scale(scaled.whole, 0, factor)
    totals = []
    for taught in (plain, scaled):
        taught.set_normalisers(batches)
        totals.append(taught.whole.total(taught.terms(batches[3])))
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_set_normalisers_leaves_batch_norm_statistics_and_mode(
    teacher: nn.Module, batches: list[Batch], training: bool
) -> None:
    taught = lesson(residual_student(), BLOCKS, teacher)
    taught.whole.train(training)
    before = weights_sha256(taught.whole.student.state_dict())
    taught.set_normalisers(batches)
    assert weights_sha256(taught.whole.student.state_dict()) == before
    assert {module.training for module in taught.whole.modules()} == {training}


def test_set_normalisers_without_pairs_does_nothing(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), HintConfiguration(logit_weight=1.0), plain_network(6))
    taught.set_normalisers(batches)
    assert taught.whole.normalisers.shape == (0,)


def test_hint_loss_that_is_zero_at_the_start_is_an_error_naming_it(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    pairs = (replace(AT, student_layer="conv2"), AT)
    taught = lesson(plain_network(), replace(HINTS, pairs=pairs), plain_network())
    scale(taught.whole, 1, 0.0)
    with pytest.raises(InputError) as caught:
        taught.set_normalisers(batches)
    assert str(caught.value) == (
        "the hint loss at of conv1 → conv1 is 0 at the start, but must be at least 1e-08 to be normalised; "
        "choose another loss or pair"
    )


def test_smallest_raw_loss_that_can_be_normalised_is_1e_8(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    taught = lesson(plain_network(), replace(HINTS, pairs=(AT,)), plain_network(6))
    raw = float(taught.raw_hints(batches).mean())
    scale(taught.whole, 0, 1.01e-8 / raw)
    taught.set_normalisers(batches)
    scale(taught.whole, 0, 0.99 / 1.01)
    with pytest.raises(InputError, match=r"the hint loss at of conv1 → conv1 is 9.9e-09 at the start"):
        taught.set_normalisers(batches)


def test_teacher_is_no_part_of_what_is_saved(plain_network: PlainNetwork) -> None:
    whole = HintedStudent(plain_network(), replace(HINTS, pairs=(FITNET,)), plain_network(6), IMAGE)
    student = {f"student.{name}" for name in plain_network().state_dict()}
    adapters = {"_terms.0.loss.regressor.weight", "_terms.0.loss.regressor.bias"}
    assert set(whole.state_dict()) == student | adapters | {"normalisers"}


def test_every_weight_of_student_and_adapters_gets_a_gradient(teacher: nn.Module, batches: list[Batch]) -> None:
    taught = lesson(residual_student(), BLOCKS, teacher)
    torch.autograd.backward(taught.whole.total(taught.terms(batches[0])))
    assert [name for name, parameter in taught.whole.named_parameters() if parameter.grad is None] == []


def test_teacher_is_left_as_it_was(teacher: nn.Module, batches: list[Batch]) -> None:
    before = weights_sha256(teacher.state_dict())
    taught = lesson(residual_student(), BLOCKS, teacher)
    taught.set_normalisers(batches)
    torch.autograd.backward(taught.whole.total(taught.terms(batches[0])))
    assert weights_sha256(teacher.state_dict()) == before
    assert teacher.get_submodule("relu").inplace
    assert all(module.training and not module._forward_hooks for module in teacher.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_close_gives_the_student_back_as_it_was(plain_network: PlainNetwork) -> None:
    student = plain_network()
    HintedStudent(student, HINTS, plain_network(6), IMAGE).close()
    assert student.get_submodule("relu1").inplace
    assert not any(module._forward_hooks for module in student.modules())


def test_hint_loss_reads_the_parameters_of_its_own_teacher_layer(teacher: nn.Module, scales_loss: str) -> None:
    for value, layer in enumerate(("layer1.0", "layer2.0")):
        for norm in ("bn1", "bn2"):
            nn.init.constant_(teacher.get_parameter(f"{layer}.{norm}.weight"), value + 1.5)
    pairs = tuple(HintPair(layer, "layer1.0", scales_loss, 1.0) for layer in ("layer2.0", "layer1.0"))
    whole = HintedStudent(residual_student(), HintConfiguration(pairs=pairs), teacher, IMAGE)
    assert [term.loss.get_buffer("scales")[0].item() for term in whole.hint_terms] == [2.5, 1.5]


def test_teacher_may_take_images_of_another_size(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    pair = replace(FITNET, student_layer="fc", teacher_layer="flat")
    # Flattened before the pooling, so that the size of the image is the number of channels.
    student, teacher = plain_network(), nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 1), flat=nn.Flatten()))
    whole = HintedStudent(student, HintConfiguration(pairs=(pair,)), teacher, IMAGE, teacher_shape=(1, 16, 16))
    assert whole.get_parameter("_terms.0.loss.regressor.weight").shape == (2 * 16 * 16, 3, 1, 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, (0.5, 1.0, 3.0)])
def test_labels_are_smoothed_and_classes_weighted(
    plain_network: PlainNetwork, batches: list[Batch], smoothing: float, class_weights: tuple[float, ...] | None
) -> None:
    student, labelling = plain_network(), Labelling(smoothing, class_weights)
    whole = HintedStudent(student, HintConfiguration(), None, IMAGE, labelling=labelling)
    logits = layers_by_hand(student, batches[0].images)["logits"].double()
    weights = torch.tensor(class_weights or (1.0, 1.0, 1.0)).double()
    # Targets of 1 − s for the label, and s/3 for each class; the mean is weighted by the labels' classes.
    target = (1 - smoothing) * functional.one_hot(batches[0].labels, 3) + smoothing / 3
    losses = -(target * weights * logits.log_softmax(dim=1)).sum(dim=1)
    expected = losses.sum() / weights[batches[0].labels].sum()
    assert whole.terms(batches[0]).classification.item() == pytest.approx(expected.item(), rel=1e-5)


def test_where_the_networks_run_in_bf16_adapters_do_so_too_but_losses_are_in_float32(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    adapted: list[torch.dtype] = []
    seen: list[torch.dtype] = []

    class Watched(HintLoss):
        def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
            adapted.append((student @ student).dtype)
            return student, teacher

        def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
            seen.extend([student.dtype, teacher.dtype, (student.flatten(1) @ teacher.flatten(1).t()).dtype])
            return student.mean()

    taught = lesson(plain_network(), replace(HINTS, pairs=(AT,)), plain_network(4), Execution(precision="bf16"))
    taught.whole.hint_terms[0].loss = Watched(FeatureShape(4, 8, 8), FeatureShape(4, 8, 8))
    terms = taught.terms(batches[0])
    assert (adapted, seen) == ([torch.bfloat16], [torch.float32] * 3)
    assert {terms.classification.dtype, terms.logit.dtype, terms.hints.dtype} == {torch.float32}


def test_student_in_bf16_is_near_the_one_in_float32(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    exact, rounded = (
        lesson(plain_network(), HINTS, plain_network(6), Execution(precision=precision)).terms(batches[0])
        for precision in ("fp32", "bf16")
    )
    for name in ("classification", "logit", "hints"):
        ours, theirs = getattr(rounded, name), getattr(exact, name)
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0)


def test_missing_teacher_is_an_error(plain_network: PlainNetwork) -> None:
    expected = "the hint configuration has a logit or hint loss, but there is no teacher"
    assert error_of(HintConfiguration(logit_weight=1.0), plain_network(), None) == expected


@pytest.mark.parametrize("side", ["teacher_layer", "student_layer"])
def test_unknown_layer_is_an_error_with_the_nearest_name(plain_network: PlainNetwork, side: str) -> None:
    layers: dict[str, Any] = {side: "conv3"}
    message = error_of(replace(HINTS, pairs=(replace(AT, **layers),)), plain_network(), plain_network(6))
    assert message.startswith("Sequential has no layer 'conv3'; did you mean 'conv")


def test_vector_is_a_feature_map_of_one_position(plain_network: PlainNetwork) -> None:
    student, teacher = plain_network(), plain_network(6)
    hints = replace(HINTS, pairs=(replace(AT, student_layer="fc"),))
    taught = lesson(student, hints, teacher)
    images = torch.randn(4, 1, 8, 8)
    terms = taught.terms(Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), images))
    # Both attention maps have one position, hence are 1 after normalisation.
    torch.testing.assert_close(terms.hints, torch.zeros(1))


def test_unknown_hint_loss_is_an_error_with_the_nearest_name(plain_network: PlainNetwork) -> None:
    hints = replace(HINTS, pairs=(replace(AT, loss="fitnt"),))
    message = error_of(hints, plain_network(), plain_network(6))
    assert message.startswith("unknown hint loss 'fitnt'; did you mean 'fitnet'?")


def test_unknown_logit_loss_is_an_error(plain_network: PlainNetwork) -> None:
    hints = replace(HINTS, logit_loss="kdd")
    assert error_of(hints, plain_network(), plain_network(6)).startswith("unknown logit loss 'kdd'; ")
