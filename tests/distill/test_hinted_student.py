from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hintsearch.distill.batches import Batch
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hinted_student import HintedStudent, LossTerms
from hintsearch.distill.losses import HINT_LOSSES, FeatureShape, kd
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


class Scaled(nn.Module):
    """A hint loss whose raw values are `factor` times as large."""

    def __init__(self, loss: nn.Module, factor: float) -> None:
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        raw: Tensor = self.loss(student, teacher)
        return self.factor * raw


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


def raw_hints(whole: HintedStudent, batches: list[Batch]) -> Tensor:
    return torch.stack([whole.terms(batch).hints.detach() for batch in batches])


def error_of(hints: HintConfiguration, student: nn.Module, teacher: nn.Module | None) -> str:
    with pytest.raises(InputError) as caught:
        HintedStudent(student, hints, teacher, IMAGE)
    return str(caught.value)


def test_terms_are_the_losses_of_the_named_layers(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    student, teacher = plain_network(4), plain_network(6, seed=1)
    terms = HintedStudent(student, HINTS, teacher, IMAGE).terms(batches[0])
    ours, theirs = (layers_by_hand(network, batches[0].images) for network in (student, teacher))
    shape = FeatureShape(1, 1, 1)
    at, sp = HINT_LOSSES.get("at")(shape, shape), HINT_LOSSES.get("sp")(shape, shape)
    expected = LossTerms(
        classification=functional.cross_entropy(ours["logits"], batches[0].labels),
        logit=kd(ours["logits"], theirs["logits"], 2.0),
        hints=torch.stack([at(ours["conv1"], theirs["conv1"]), sp(ours["conv2"], theirs["conv2"])]),
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
    whole = HintedStudent(plain_network(), replace(HINTS, logit_weight=0.0), plain_network(6), IMAGE)
    assert float(whole.terms(batches[0]).logit) == 0


def test_logit_loss_works_without_pairs(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    whole = HintedStudent(plain_network(), HintConfiguration(logit_weight=0.3), plain_network(6), IMAGE)
    terms = whole.terms(batches[0])
    torch.testing.assert_close(whole.total(terms), terms.classification + 0.3 * terms.logit)


def test_pair_of_weight_zero_is_dropped(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    hints = replace(HINTS, pairs=(AT, replace(FITNET, weight=0.0), SP))
    whole = HintedStudent(plain_network(), hints, plain_network(6), IMAGE)
    assert len(whole.hint_losses) == 2
    assert whole.terms(batches[0]).hints.shape == (2,)


def test_dropped_pair_may_name_layers_that_do_not_exist(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    hints = replace(HINTS, pairs=(replace(AT, teacher_layer="none", student_layer="none", weight=0.0),))
    whole = HintedStudent(plain_network(), hints, plain_network(6), IMAGE)
    assert whole.terms(batches[0]).hints.shape == (0,)


def test_repeated_student_layer_learns_from_each_of_its_teacher_layers(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    pairs = (replace(AT, teacher_layer="conv1"), replace(AT, teacher_layer="conv2"))
    student, teacher = plain_network(), plain_network(6)
    both = raw_hints(HintedStudent(student, replace(HINTS, pairs=pairs), teacher, IMAGE), batches)
    for column, pair in enumerate(pairs):
        alone = raw_hints(HintedStudent(student, replace(HINTS, pairs=(pair,)), teacher, IMAGE), batches)
        torch.testing.assert_close(both[:, column], alone[:, 0])


def test_adapter_fits_layers_of_other_channels_and_sizes(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    pair = replace(FITNET, student_layer="conv1", teacher_layer="conv2")
    whole = HintedStudent(plain_network(4), replace(HINTS, pairs=(pair,)), plain_network(6), IMAGE)
    assert whole.get_parameter("hint_losses.0.regressor.weight").shape == (12, 4, 1, 1)
    assert whole.terms(batches[0]).hints.isfinite().all()


def test_normalisers_are_the_mean_raw_losses_of_the_batches(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    whole = HintedStudent(plain_network(), HINTS, plain_network(6), IMAGE)
    whole.set_normalisers(batches)
    torch.testing.assert_close(whole.normalisers, raw_hints(whole, batches).mean(dim=0))


def test_normalisers_are_measured_in_training_mode(teacher: nn.Module, batches: list[Batch]) -> None:
    whole = HintedStudent(residual_student(), BLOCKS, teacher, IMAGE).eval()
    whole.set_normalisers(batches)
    measured = whole.normalisers.clone()
    assert not torch.allclose(measured, raw_hints(whole, batches).mean(dim=0), rtol=1e-2)
    torch.testing.assert_close(measured, raw_hints(whole.train(), batches).mean(dim=0))


def test_normalisers_do_not_depend_on_those_before(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    whole = HintedStudent(plain_network(), HINTS, plain_network(6), IMAGE)
    whole.set_normalisers(batches)
    before = whole.normalisers.clone()
    whole.set_normalisers(batches)
    assert torch.equal(whole.normalisers, before)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
def test_raw_size_of_a_loss_does_not_change_its_normalised_term(
    plain_network: PlainNetwork, batches: list[Batch], factor: float
) -> None:
    plain, scaled = (HintedStudent(plain_network(), HINTS, plain_network(6), IMAGE) for _ in range(2))
    scaled.hint_losses[0] = Scaled(scaled.hint_losses[0], factor)
    totals = []
    for whole in (plain, scaled):
        whole.set_normalisers(batches)
        totals.append(whole.total(whole.terms(batches[3])))
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_set_normalisers_leaves_batch_norm_statistics_and_mode(
    teacher: nn.Module, batches: list[Batch], training: bool
) -> None:
    whole = HintedStudent(residual_student(), BLOCKS, teacher, IMAGE).train(training)
    before = weights_sha256(whole.student.state_dict())
    whole.set_normalisers(batches)
    assert weights_sha256(whole.student.state_dict()) == before
    assert {module.training for module in whole.modules()} == {training}


def test_set_normalisers_leaves_the_teacher_as_it_was(teacher: nn.Module, batches: list[Batch]) -> None:
    before = weights_sha256(teacher.state_dict())
    HintedStudent(residual_student(), BLOCKS, teacher, IMAGE).set_normalisers(batches)
    assert weights_sha256(teacher.state_dict()) == before


def test_set_normalisers_without_pairs_does_nothing(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    whole = HintedStudent(plain_network(), HintConfiguration(logit_weight=1.0), plain_network(6), IMAGE)
    whole.set_normalisers(batches)
    assert whole.normalisers.shape == (0,)


def test_hint_loss_that_is_zero_at_the_start_is_an_error_naming_it(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    pairs = (replace(AT, student_layer="conv2"), AT)
    whole = HintedStudent(plain_network(), replace(HINTS, pairs=pairs), plain_network(), IMAGE)
    with pytest.raises(InputError) as caught:
        whole.set_normalisers(batches)
    assert str(caught.value) == (
        "the hint loss at of conv1 → conv1 is 0 at the start, but must be at least 1e-08 to be normalised; "
        "choose another loss or pair"
    )


def test_smallest_raw_loss_that_can_be_normalised_is_1e_8(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    whole = HintedStudent(plain_network(), replace(HINTS, pairs=(AT,)), plain_network(6), IMAGE)
    raw = float(raw_hints(whole, batches).mean())
    loss = whole.hint_losses[0]
    whole.hint_losses[0] = Scaled(loss, 1.01e-8 / raw)
    whole.set_normalisers(batches)
    whole.hint_losses[0] = Scaled(loss, 0.99e-8 / raw)
    with pytest.raises(InputError, match=r"the hint loss at of conv1 → conv1 is 9.9e-09 at the start"):
        whole.set_normalisers(batches)


def test_teacher_is_no_part_of_what_is_saved(plain_network: PlainNetwork) -> None:
    whole = HintedStudent(plain_network(), replace(HINTS, pairs=(FITNET,)), plain_network(6), IMAGE)
    student = {f"student.{name}" for name in plain_network().state_dict()}
    adapters = {"hint_losses.0.regressor.weight", "hint_losses.0.regressor.bias"}
    assert set(whole.state_dict()) == student | adapters | {"normalisers"}


def test_teacher_gets_no_gradient(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    teacher = plain_network(6)
    whole = HintedStudent(plain_network(), HINTS, teacher, IMAGE)
    torch.autograd.backward(whole.total(whole.terms(batches[0])))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_every_weight_of_student_and_adapters_gets_a_gradient(teacher: nn.Module, batches: list[Batch]) -> None:
    whole = HintedStudent(residual_student(), BLOCKS, teacher, IMAGE)
    torch.autograd.backward(whole.total(whole.terms(batches[0])))
    assert [name for name, parameter in whole.named_parameters() if parameter.grad is None] == []


def test_teacher_stays_in_eval_mode_when_the_student_trains(teacher: nn.Module, batches: list[Batch]) -> None:
    before = weights_sha256(teacher.state_dict())
    whole = HintedStudent(residual_student(), BLOCKS, teacher, IMAGE).train()
    whole.terms(batches[0])
    assert not any(module.training for module in teacher.modules())
    assert weights_sha256(teacher.state_dict()) == before


def test_close_gives_both_networks_back_as_they_were(plain_network: PlainNetwork) -> None:
    student, teacher = plain_network(), plain_network(6)
    HintedStudent(student, HINTS, teacher, IMAGE).close()
    for network in (student, teacher):
        assert network.get_submodule("relu1").inplace
        assert not any(module._forward_hooks for module in network.modules())


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
    whole = HintedStudent(student, hints, teacher, (1, 8, 8))
    images = torch.randn(4, 1, 8, 8)
    terms = whole.terms(Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4)))
    # Both attention maps have one position, hence are 1 after normalisation.
    torch.testing.assert_close(terms.hints, torch.zeros(1))


def test_unknown_hint_loss_is_an_error_with_the_nearest_name(plain_network: PlainNetwork) -> None:
    hints = replace(HINTS, pairs=(replace(AT, loss="fitnt"),))
    message = error_of(hints, plain_network(), plain_network(6))
    assert message.startswith("unknown hint loss 'fitnt'; did you mean 'fitnet'?")


def test_unknown_logit_loss_is_an_error(plain_network: PlainNetwork) -> None:
    hints = replace(HINTS, logit_loss="kdd")
    assert error_of(hints, plain_network(), plain_network(6)).startswith("unknown logit loss 'kdd'; ")
