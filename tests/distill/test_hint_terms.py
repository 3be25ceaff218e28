"""From the pairs of a configuration to the terms of a loss."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hintsearch.distill.batches import Batch
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hint_terms import make_hint_terms, teacher_terms
from hintsearch.distill.hinted_student import HintedStudent
from hintsearch.distill.losses import HINT_LOSSES, FeatureShape, HintLoss, JointHintLoss, Samples, TeacherLayer
from hintsearch.distill.teacher_pass import TeacherOutputs, TeacherPass
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.nn import functional

PlainNetwork = Callable[..., nn.Sequential]

IMAGE = (1, 8, 8)
FIRST, SECOND = HintPair("conv1", "conv1", "at", 2.0), HintPair("conv2", "conv2", "at", 0.5)


def also(pair: HintPair, loss: str, weight: float = 1.0) -> HintPair:
    return replace(pair, loss=loss, weight=weight)


class Taught:
    """A student with hints, and what its teacher says of the images."""

    def __init__(self, student: nn.Module, teacher: nn.Module, hints: HintConfiguration) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.whole = HintedStudent(student, hints, teacher, IMAGE)
        self._teacher = TeacherPass(teacher, self.whole.teacher_layers, hints.logit_weight > 0, IMAGE, Execution())

    def outputs(self, batch: Batch) -> TeacherOutputs:
        return self._teacher(batch.teacher_images)

    def hints(self, batch: Batch) -> Tensor:
        return self.whole.terms(batch, self.outputs(batch)).hints.detach()

    def set_normalisers(self, batches: list[Batch]) -> None:
        self.whole.set_normalisers(batches, [self.outputs(batch) for batch in batches])


def residual(width: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_model(ModelSpec("resnet8", 3, 1, width=width))


def layers_by_hand(network: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """The convolutions and the classifier's input of a plain network, from its weights alone."""
    weights = dict(network.named_parameters())
    first = functional.conv2d(images, weights["conv1.weight"], weights["conv1.bias"], padding=1)
    second = functional.conv2d(first.clamp(min=0), weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1)
    return {"conv1": first, "conv2": second, "embedding": second.clamp(min=0).mean((2, 3), keepdim=True)}


def test_several_losses_on_a_pair_are_terms_of_their_own(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    pairs = (FIRST, also(FIRST, "sp"), also(FIRST, "nst"))
    student, teacher = plain_network(), plain_network(6, seed=1)
    together = Taught(student, teacher, HintConfiguration(pairs))
    assert [term.name for term in together.whole.hint_terms] == ["at.conv1", "sp.conv1", "nst.conv1"]
    assert together.whole.teacher_layers == ("conv1",)
    alone = [Taught(student, teacher, HintConfiguration((pair,))).hints(batches[0]) for pair in pairs]
    torch.testing.assert_close(together.hints(batches[0]), torch.cat(alone))


def test_several_losses_on_a_pair_keep_their_weights_and_normalisers(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    hints = HintConfiguration((FIRST, also(FIRST, "sp", 3.0)), classification_weight=0.0)
    taught = Taught(plain_network(), plain_network(6, seed=1), hints)
    taught.set_normalisers(batches)
    raw = torch.stack([taught.hints(batch) for batch in batches])
    means = raw.mean(dim=0)
    assert taught.whole.pair_normalisers == pytest.approx(means.tolist(), rel=1e-5)
    total = taught.whole.total(taught.whole.terms(batches[0], taught.outputs(batches[0])))
    torch.testing.assert_close(total, 2.0 * raw[0, 0] / means[0] + 3.0 * raw[0, 1] / means[1])


def test_pairs_of_a_joint_loss_are_one_term_where_the_first_stands(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    joint = tuple(also(pair, "fsp", 3.0) for pair in (FIRST, SECOND))
    pairs = (FIRST, joint[0], SECOND, joint[1])
    student, teacher = plain_network(4), plain_network(4, seed=1)
    taught = Taught(student, teacher, HintConfiguration(pairs))
    assert [term.pairs for term in taught.whole.hint_terms] == [(FIRST,), joint, (SECOND,)]
    assert [term.weight for term in taught.whole.hint_terms] == [2.0, 3.0, 0.5]
    assert [term.name for term in taught.whole.hint_terms] == ["at.conv1", "fsp.conv1", "at.conv2"]
    ours, theirs = (layers_by_hand(network, batches[0].images) for network in (student, teacher))
    shapes = [FeatureShape(4, 8, 8), FeatureShape(8, 4, 4)]
    fsp = HINT_LOSSES.get("fsp")
    assert issubclass(fsp, JointHintLoss)
    expected = fsp(shapes, shapes)([ours["conv1"], ours["conv2"]], [theirs["conv1"], theirs["conv2"]])
    torch.testing.assert_close(taught.hints(batches[0])[1], expected.detach())


def test_pair_of_weight_zero_is_no_part_of_a_joint_term(plain_network: PlainNetwork) -> None:
    pairs = (also(FIRST, "fsp"), also(SECOND, "fsp", 0.0))
    taught = Taught(plain_network(4), plain_network(4, seed=1), HintConfiguration(pairs))
    assert [term.pairs for term in taught.whole.hint_terms] == [pairs[:1]]


def test_unequal_weights_of_a_joint_loss_are_refused(plain_network: PlainNetwork) -> None:
    hints = HintConfiguration((also(FIRST, "fsp", 3.0), FIRST, also(SECOND, "fsp", 0.5)))
    with pytest.raises(InputError) as caught:
        Taught(plain_network(4), plain_network(4), hints)
    assert str(caught.value) == (
        "the pairs of the joint hint loss fsp have the weights [0.5, 3.0], but it is one term; give all of them one "
        "weight"
    )


@pytest.mark.parametrize(
    ("hints", "count"),
    [
        (HintConfiguration(), 0),
        (HintConfiguration(logit_weight=1.0), 1),
        (HintConfiguration((FIRST, also(FIRST, "sp"), replace(SECOND, weight=0.0)), logit_weight=1.0), 3),
        (HintConfiguration((also(FIRST, "fsp"), also(SECOND, "fsp"), FIRST)), 2),
        (HintConfiguration((FIRST,), embedding_weight=0.5), 2),
    ],
)
def test_terms_that_read_the_teacher_are_counted(hints: HintConfiguration, count: int) -> None:
    assert teacher_terms(hints) == count


def test_terms_that_are_not_normalised_keep_their_raw_weights(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    hints = HintConfiguration(
        (FIRST, SECOND), classification_weight=0.7, logit_weight=0.3, embedding_weight=5.0, normalise=False
    )
    taught = Taught(plain_network(), plain_network(6, seed=1), hints)
    taught.set_normalisers(batches)
    assert taught.whole.pair_normalisers == (1.0, 1.0)
    terms = taught.whole.terms(batches[0], taught.outputs(batches[0]))
    expected = (
        0.7 * terms.classification
        + 0.3 * terms.logit
        + 2.0 * terms.hints[0]
        + 0.5 * terms.hints[1]
        + 5.0 * terms.hints[2]
    )
    torch.testing.assert_close(taught.whole.total(terms), expected)


def test_term_of_zero_at_the_start_is_no_error_where_nothing_is_normalised(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    # The student is its own teacher.
    taught = Taught(plain_network(), plain_network(), HintConfiguration((FIRST,), normalise=False))
    taught.set_normalisers(batches)
    # Less than could be normalised.
    assert float(taught.hints(batches[0])) < 1e-8


@pytest.mark.parametrize("loss", ["pkt_symmetric", "sp"])
def test_embedding_term_reads_what_both_classifiers_are_given(
    plain_network: PlainNetwork, batches: list[Batch], loss: str
) -> None:
    student, teacher = plain_network(4), plain_network(6, seed=1)
    renamed = nn.Sequential(
        OrderedDict(("head" if name == "fc" else name, layer) for name, layer in teacher.named_children())
    )
    hints = HintConfiguration((SECOND,), embedding_weight=0.5, embedding_loss=loss)
    taught = Taught(student, renamed, hints)
    term = taught.whole.hint_terms[1]
    assert (term.student_taps, term.teacher_taps) == (("fc:input",), ("head:input",))
    assert (term.weight, term.name) == (0.5, "embedding")
    ours, theirs = (layers_by_hand(network, batches[0].images)["embedding"] for network in (student, teacher))
    kind = HINT_LOSSES.get(loss)
    assert issubclass(kind, HintLoss)
    expected = kind(FeatureShape(8, 1, 1), FeatureShape(12, 1, 1)).compare(ours, theirs).mean()
    torch.testing.assert_close(taught.hints(batches[0])[1], expected.detach())


def test_embedding_is_no_part_of_a_joint_term_of_the_same_loss(plain_network: PlainNetwork) -> None:
    hints = HintConfiguration((also(FIRST, "fsp", 3.0),), embedding_weight=0.5, embedding_loss="fsp")
    terms = Taught(plain_network(4), plain_network(4, seed=1), hints).whole.hint_terms
    assert [(term.name, term.weight, len(term.pairs)) for term in terms] == [
        ("fsp.conv1", 3.0, 1),
        ("embedding", 0.5, 1),
    ]


def test_embedding_term_teaches_the_student(plain_network: PlainNetwork, batches: list[Batch]) -> None:
    hints = HintConfiguration(embedding_weight=1.0, classification_weight=0.0)
    taught = Taught(plain_network(4), plain_network(6, seed=1), hints)
    torch.autograd.backward(taught.whole.total(taught.whole.terms(batches[0], taught.outputs(batches[0]))))
    taught_by_it = [
        name
        for name, parameter in taught.whole.student.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    ]
    assert taught_by_it == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]


def test_pair_normalisers_stand_beside_the_pairs_of_the_configuration(
    plain_network: PlainNetwork, batches: list[Batch]
) -> None:
    joint = tuple(also(pair, "fsp") for pair in (FIRST, SECOND))
    pairs = (replace(FIRST, weight=0.0), joint[0], FIRST, joint[1], also(SECOND, "sp", 0.0), SECOND)
    taught = Taught(plain_network(4), plain_network(4, seed=1), HintConfiguration(pairs, embedding_weight=1.0))
    assert [term.name for term in taught.whole.hint_terms] == [
        "fsp.conv1",
        "at.conv1",
        "at.conv2",
        "embedding",
    ]
    taught.whole.normalisers.copy_(torch.tensor([2.0, 4.0, 8.0, 16.0]))
    assert taught.whole.pair_normalisers == (None, 2.0, 4.0, 2.0, None, 8.0)


def test_equal_pairs_keep_their_own_places(plain_network: PlainNetwork) -> None:
    pairs = (FIRST, HintPair("conv1", "conv1", "at", 2.0))
    taught = Taught(plain_network(4), plain_network(6), HintConfiguration(pairs))
    taught.whole.normalisers.copy_(torch.tensor([2.0, 4.0]))
    assert taught.whole.pair_normalisers == (2.0, 4.0)


@pytest.mark.parametrize(
    ("loss", "ours", "theirs"),
    [
        ("at", "layer1.0", "layer2.0"),
        ("ab", "layer1.0.relu:input", "layer2.0.relu:input"),
        ("ofd", "layer1.0.relu:input", "layer2.0.relu:input"),
        ("reviewkd", "layer1.0", "layer2.0.relu:input"),
    ],
)
def test_losses_of_features_before_the_activation_tap_its_input(
    teacher: nn.Module, loss: str, ours: str, theirs: str
) -> None:
    hints = HintConfiguration((HintPair("layer2.0", "layer1.0", loss, 1.0),))
    (term,) = Taught(residual(0.25), teacher, hints).whole.hint_terms
    assert (term.student_taps, term.teacher_taps) == ((ours,), (theirs,))
    assert term.name == f"{loss}.layer2.0"


@pytest.mark.parametrize("path", ["bn1", "fc:input"])
def test_layer_that_no_activation_ends_is_read_as_it_is(teacher: nn.Module, path: str) -> None:
    hints = HintConfiguration((HintPair(path, path, "ab", 1.0),))
    (term,) = Taught(residual(0.25), teacher, hints).whole.hint_terms
    assert (term.student_taps, term.teacher_taps) == ((path,), (path,))


def test_features_before_the_activation_are_those_of_both_networks(teacher: nn.Module, batches: list[Batch]) -> None:
    student = residual(0.25)
    pairs = (HintPair("layer2.0", "layer1.0", "ab", 1.0), HintPair("layer2.0", "layer1.0", "at", 1.0))
    taught = Taught(student, teacher, HintConfiguration(pairs))
    student.eval()
    outputs = taught.outputs(batches[0])
    with torch.no_grad():
        _, features = taught.whole._run(batches[0].images, Execution())
    for found, before, after in (
        (features, "layer1.0.relu:input", "layer1.0"),
        (outputs.features, "layer2.0.relu:input", "layer2.0"),
    ):
        assert float(found[before].min()) < 0
        torch.testing.assert_close(found[before].clamp(min=0), found[after], rtol=0, atol=0)


class Noted(HintLoss):
    """Keeps what it is told."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.shapes = student, teacher
        self.layer: TeacherLayer | None = None
        self.labels: Tensor | None = None
        self.samples: list[Samples] = []

    def read_teacher(self, layer: TeacherLayer) -> None:
        self.layer = layer

    def read_training_set(self, labels: Tensor) -> None:
        self.labels = labels

    def compare_samples(self, student: Tensor, teacher: Tensor, samples: Samples) -> Tensor:
        self.samples.append(samples)
        return student.mean((1, 2, 3))


@pytest.mark.parametrize("labels", [None, torch.arange(60) % 3])
def test_a_loss_is_told_of_shapes_teacher_training_set_and_samples(
    plain_network: PlainNetwork, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, labels: Tensor | None
) -> None:
    monkeypatch.setattr(HINT_LOSSES, "_entries", dict(HINT_LOSSES._entries))
    HINT_LOSSES.register("noted", source="this test")(Noted)
    student, teacher = plain_network(4), plain_network(6)
    hints = HintConfiguration((HintPair("conv2", "conv1", "noted", 1.0),))
    (term,) = make_hint_terms(hints, student, teacher, IMAGE, (1, 16, 16), labels)
    assert isinstance(term.loss, Noted)
    assert term.loss.shapes == (FeatureShape(4, 8, 8), FeatureShape(12, 8, 8))
    assert term.loss.layer == TeacherLayer(teacher, "conv2", (1, 16, 16))
    assert term.loss.labels is labels
    samples = Samples(batches[0].indices, batches[0].labels)
    features = {"conv1": torch.zeros(7, 4, 8, 8)}, {"conv2": torch.zeros(7, 12, 8, 8)}
    term(*features, samples, Execution())
    assert term.loss.samples == [samples]


def test_term_of_an_own_loss_is_named_by_its_function_alone(plain_network: PlainNetwork, tmp_path: Path) -> None:
    path = tmp_path / "my losses.py"
    path.write_text("def own(student, teacher):\n    return (student.mean() - teacher.mean()).square()\n")
    taught = Taught(plain_network(4), plain_network(6), HintConfiguration((also(FIRST, f"{path}:own"),)))
    assert [term.name for term in taught.whole.hint_terms] == ["own.conv1"]
