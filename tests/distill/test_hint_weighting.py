"""Trainings whose distillation terms are weighed for each image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill.batches import Batch, DeviceImages
from hintsearch.distill.data import DataSpec, DataSplits, ImageSet, load_data
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hint_weighting import HintWeighting
from hintsearch.distill.hinted_student import HintedStudent
from hintsearch.distill.losses import HINT_LOSSES, HintLoss, Samples
from hintsearch.distill.meta_step import MetaStep, WeightedLosses
from hintsearch.distill.parts import Part
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, TeacherNetwork, Trainer
from hintsearch.distill.virtual_pass import untracked_batch_norm
from hintsearch.distill.warmup import Warmup
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from small_training import HINTS, PAIRS, RECIPE, STUDENT, figures, trained
from torch import Tensor, nn
from torch.nn import functional

SETTINGS = DynamicWeights(hidden=20, lr=0.01, meta_images=15, meta_batch_size=10, warmup_fraction=0.0)
DYNAMIC = replace(HINTS, dynamic_weights=SETTINGS)
NAMES = ["hint_weight.logit", "hint_weight.fitnet.layer1.0", "hint_weight.at.layer3.0"]

MakeTrainer = Callable[..., Trainer]
PlainNetwork = Callable[..., nn.Sequential]


@pytest.fixture
def with_meta(splits: DataSplits) -> DataSplits:
    """45 of the training images to train on, 15 to learn weights on."""
    assert isinstance(splits.train, ImageSet)
    return replace(splits, train=splits.train.subset(np.arange(45)), meta=splits.train.subset(np.arange(45, 60)))


@pytest.fixture
def make_trainer(with_meta: DataSplits, teacher: nn.Module) -> MakeTrainer:
    """Makes trainers of the small student on three steps an epoch, by default for two epochs with dynamic weights."""

    def make(hints: HintConfiguration = DYNAMIC, **changes: Any) -> Trainer:
        arguments: dict[str, Any] = {"splits": with_meta, "recipe": RECIPE, "rungs": (2,), "seeds": Seeds(1, 2)}
        return Trainer(STUDENT, hints=hints, teacher=TeacherNetwork(teacher), **(arguments | changes))

    return make


def without_weights(run: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in one.items() if not name.startswith("hint_weight.")} for one in run]


def weights_of(run: list[dict[str, float]]) -> list[list[float]]:
    """Of each epoch, the mean weights of the terms."""
    return [[value for name, value in one.items() if name.startswith("hint_weight.")] for one in run]


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of parameters and buffers of student, adapters and losses."""
    (training,) = trainer._group._trainings
    return {name: value.clone() for name, value in training.whole.state_dict().items()}


def assert_near(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_without_learning_it_is_the_training_with_fixed_weights(make_trainer: MakeTrainer) -> None:
    fixed, uniform = (
        make_trainer(replace(HINTS, dynamic_weights=dynamic)) for dynamic in (None, replace(SETTINGS, meta=False))
    )
    expected, found = trained(fixed)[0], trained(uniform)[0]
    assert weights_of(found) == [[1.0] * 3] * 2
    assert_near(without_weights(found), expected)
    for name, value in state_of(fixed).items():
        torch.testing.assert_close(state_of(uniform)[name], value, rtol=1e-4, atol=1e-5)


def test_in_the_epochs_before_it_learns_it_is_the_training_with_fixed_weights(make_trainer: MakeTrainer) -> None:
    late = replace(HINTS, dynamic_weights=replace(SETTINGS, warmup_fraction=0.5))
    expected, found = trained(make_trainer(HINTS, rungs=(4,)))[0], trained(make_trainer(late, rungs=(4,)))[0]
    assert_near(without_weights(found)[:2], expected[:2])
    assert weights_of(found)[:2] == [[1.0] * 3] * 2
    assert all(one != [1.0] * 3 for one in weights_of(found)[2:])
    assert without_weights(found)[3]["val_loss"] != pytest.approx(expected[3]["val_loss"], rel=1e-4)


def test_mean_weights_of_the_terms_are_told_and_average_to_one(make_trainer: MakeTrainer) -> None:
    for result in make_trainer().epochs():
        found = [name for name in result.metrics if name.startswith("hint_weight.")]
        assert found == NAMES
        assert sum(result.metrics[name] for name in NAMES) / 3 == pytest.approx(1, rel=1e-6)
        assert len({result.metrics[name] for name in NAMES}) == 3


class Targets(HintLoss):
    """Squared error of the student's logits with a vector for each image."""

    targets: Tensor

    def compare_samples(self, student: Tensor, teacher: Tensor, samples: Samples) -> Tensor:
        return (student.flatten(1) - self.targets[samples.indices]).square().mean(dim=1)


class RandomTargets(Targets):
    def read_training_set(self, labels: Tensor) -> None:
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("targets", 3 * torch.randn(len(labels), 3, generator=generator))


class TrueTargets(Targets):
    def read_training_set(self, labels: Tensor) -> None:
        self.register_buffer("targets", 3 * functional.one_hot(labels, 3).float())


@pytest.fixture
def noise_and_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hint losses, registered for one test."""
    monkeypatch.setattr(HINT_LOSSES, "_entries", dict(HINT_LOSSES._entries))
    HINT_LOSSES.register("noise", source="this test")(RandomTargets)
    HINT_LOSSES.register("truth", source="this test")(TrueTargets)


@pytest.mark.usefixtures("noise_and_truth")
@pytest.mark.parametrize("order", [("noise", "truth"), ("truth", "noise")])
@pytest.mark.parametrize("ensemble", [True, False])
def test_hint_with_random_targets_loses_weight_to_a_useful_one(
    make_trainer: MakeTrainer, order: tuple[str, str], ensemble: bool
) -> None:
    settings = replace(SETTINGS, hidden=100, meta_batch_size=15, ensemble=ensemble)
    hints = HintConfiguration(tuple(HintPair("fc", "fc", loss, 1.0) for loss in order), dynamic_weights=settings)
    recipe = Recipe(lr=0.05, batch_size=15, crop_padding=0, flip=False)
    run = [result.metrics for result in make_trainer(hints, recipe=recipe, rungs=(4,)).epochs()]
    noise, truth = ([one[f"hint_weight.{loss}.fc"] for one in run] for loss in ("noise", "truth"))
    assert noise == sorted(noise, reverse=True)
    assert truth == sorted(truth)
    assert noise[-1] < 0.7
    assert truth[-1] > 1.3


@pytest.mark.parametrize("done", [1, 2])
def test_resumed_run_has_the_same_weights_to_the_last_bit(make_trainer: MakeTrainer, tmp_path: Path, done: int) -> None:
    hints = replace(DYNAMIC, dynamic_weights=replace(SETTINGS, warmup_fraction=0.4, meta_every=2))
    changes: dict[str, Any] = {"rungs": (3, 4), "recipe": replace(RECIPE, ema_decay=0.9)}
    undisturbed = make_trainer(hints, **changes)
    expected = trained(undisturbed)
    interrupted = make_trainer(hints, **changes)
    epochs = interrupted.epochs()
    before = [next(epochs) for _ in range(done)]
    interrupted.save_checkpoint(tmp_path / "half.pt")
    resumed = make_trainer(hints, **changes)
    resumed.load_checkpoint(tmp_path / "half.pt")
    after, weights = trained(resumed)
    assert (figures(before) + after, weights) == expected

    saved = []
    for trainer in (undisturbed, resumed):
        trainer.save_checkpoint(tmp_path / "end.pt")
        saved.append(torch.load(tmp_path / "end.pt", weights_only=True)["students"][0]["weighting"])
    ours, theirs = saved
    assert ours.keys() == theirs.keys() == {"network", "history", "optimizer", "step"}
    # Three steps in each of the three epochs after the one with uniform weights.
    assert ours["step"] == theirs["step"] == 9
    for part in ("network", "history"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert ours["history"]["seen"].all()
    assert not (ours["history"]["values"] == 1).any()
    for number, moments in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][number][name]) for name, value in moments.items())


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of each step."""
    weights: list[Tensor] = []
    learn = HintWeighting._weights

    def noted(self: HintWeighting, *arguments: Any) -> Tensor:
        weights.append(learn(self, *arguments))
        return weights[-1]

    monkeypatch.setattr(HintWeighting, "_weights", noted)
    return weights


@pytest.mark.parametrize("loss", ["at", "vid", "crd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_virtual_passes_leave_statistics_and_memories_alone(
    make_trainer: MakeTrainer, applied: list[Tensor], monkeypatch: pytest.MonkeyPatch, loss: str, precision: str
) -> None:
    hints = replace(DYNAMIC, pairs=(PAIRS[0], replace(PAIRS[1], loss=loss)))
    execution = Execution(precision=precision)
    learned = make_trainer(hints, execution=execution)
    expected = trained(learned)
    assert len(applied) == 6
    assert not torch.equal(applied[-1], torch.ones_like(applied[-1]))
    left = iter(applied)
    monkeypatch.setattr(HintWeighting, "_weights", lambda *_arguments: next(left))
    replayed = make_trainer(hints, execution=execution)
    assert trained(replayed) == expected
    assert next(left, None) is None
    ours, theirs = state_of(learned), state_of(replayed)
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert any("memory" in name for name in ours) == (loss == "crd")
    # Three steps in each of two epochs.
    assert {int(value) for name, value in ours.items() if name.endswith("num_batches_tracked")} == {6}


def test_losses_remember_again_after_a_virtual_pass(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(DYNAMIC, pairs=(replace(PAIRS[1], loss="crd"),)), rungs=(1,))
    before = state_of(trainer)
    list(trainer.epochs())
    after = state_of(trainer)
    memories = [name for name in after if "memory" in name]
    assert len(memories) == 2
    assert all((after[name] != before[name]).any(dim=1).all() for name in memories)


def test_weights_are_learned_on_the_meta_images(make_trainer: MakeTrainer, with_meta: DataSplits) -> None:
    assert isinstance(with_meta.meta, ImageSet)
    turned = ImageSet(with_meta.meta.images, (with_meta.meta.labels + 1) % 3)
    run, other = (
        weights_of(trained(make_trainer(splits=splits, rungs=(1,)))[0])
        for splits in (with_meta, replace(with_meta, meta=turned))
    )
    assert run != other


def test_each_update_draws_other_meta_images(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    label_loss = HintedStudent.label_loss

    def noted(self: HintedStudent, batch: Batch) -> Tensor:
        drawn.append(batch.indices.tolist())
        return label_loss(self, batch)

    monkeypatch.setattr(HintedStudent, "label_loss", noted)
    list(make_trainer().epochs())
    assert [len(set(batch)) for batch in drawn] == [10] * 6
    assert len(set(map(tuple, drawn))) == 6
    assert set().union(*drawn) == set(range(15))


def test_without_meta_images_it_is_an_error(make_trainer: MakeTrainer, with_meta: DataSplits) -> None:
    with pytest.raises(InputError) as caught:
        make_trainer(splits=replace(with_meta, meta=None))
    assert str(caught.value) == "dynamic weights need images set aside to learn on; give data.meta_images"


@pytest.mark.parametrize(
    "hints",
    [
        HintConfiguration(logit_weight=1.0),
        HintConfiguration(pairs=PAIRS[:1]),
        HintConfiguration(pairs=(PAIRS[0], replace(PAIRS[1], weight=0.0))),
        HintConfiguration(embedding_weight=1.0),
        HintConfiguration(pairs=tuple(replace(pair, loss="fsp", weight=1.0) for pair in PAIRS)),
    ],
    ids=["logit", "hint", "one of weight 0", "embedding", "joint"],
)
def test_single_term_has_nothing_to_share(make_trainer: MakeTrainer, hints: HintConfiguration) -> None:
    with pytest.raises(InputError, match="dynamic weights share among 1 hint terms, but need at least 2"):
        make_trainer(replace(hints, dynamic_weights=SETTINGS))


def test_no_term_has_nothing_to_share(make_trainer: MakeTrainer) -> None:
    with pytest.raises(InputError, match="dynamic weights share among 0 hint terms, but need at least 2"):
        make_trainer(HintConfiguration(dynamic_weights=SETTINGS))


def test_logits_and_embedding_share(make_trainer: MakeTrainer) -> None:
    hints = HintConfiguration(logit_weight=1.0, embedding_weight=1.0, dynamic_weights=SETTINGS)
    (result,) = make_trainer(hints, rungs=(1,)).epochs()
    found = [name for name in result.metrics if name.startswith("hint_weight.")]
    assert found == ["hint_weight.logit", "hint_weight.embedding"]


def test_without_ensembling_it_is_the_training_with_the_present_weights(make_trainer: MakeTrainer) -> None:
    present, no_momentum, averaged = (
        trained(make_trainer(replace(DYNAMIC, dynamic_weights=settings)))
        for settings in (replace(SETTINGS, ensemble=False), replace(SETTINGS, momentum=0.0), SETTINGS)
    )
    assert present == no_momentum
    # Each image is seen for the first time in epoch 1, where there is nothing to average.
    assert weights_of(present[0])[0] == weights_of(averaged[0])[0]
    assert weights_of(present[0])[1] != weights_of(averaged[0])[1]


def test_dynamic_weights_follow_a_curriculum(make_trainer: MakeTrainer) -> None:
    (result,) = make_trainer(replace(DYNAMIC, warmup=Warmup(epochs=(1,))), rungs=(1,)).epochs()
    assert {*NAMES, "warmup_loss_1", "warmup_loss_2"} <= result.metrics.keys()


def test_students_of_a_group_have_weights_of_their_own(
    make_trainer: MakeTrainer, with_meta: DataSplits, teacher: nn.Module
) -> None:
    configurations = [DYNAMIC, DYNAMIC, HINTS]
    students = [TaughtStudent(hints, seed) for seed, hints in enumerate(configurations, start=2)]
    alone = [
        trained(make_trainer(hints, rungs=(1,), seeds=Seeds(1, 2 + number)))
        for number, hints in enumerate(configurations)
    ]
    assert weights_of(alone[0][0]) != weights_of(alone[1][0])
    for side_by_side in (1, 3):
        group = GroupTrainer(
            STUDENT,
            with_meta,
            RECIPE,
            (1,),
            students,
            1,
            teacher=TeacherNetwork(teacher),
            side_by_side=side_by_side,
        )
        (results,) = group.epochs()
        found = [
            (figures([result]), weights_sha256(network.state_dict()))
            for result, network in zip(results, group.networks, strict=True)
        ]
        assert found == alone


class OfBatch(HintLoss):
    """One value for the whole batch."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student.square().mean() + teacher.square().mean()


@pytest.mark.parametrize("loss", ["at", "of_batch"])
def test_loss_is_the_weighted_sum_by_hand(
    plain_network: PlainNetwork,
    batches: list[Batch],
    with_meta: DataSplits,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    monkeypatch.setattr(HINT_LOSSES, "_entries", dict(HINT_LOSSES._entries))
    HINT_LOSSES.register("of_batch", source="this test")(OfBatch)
    pairs = (HintPair("conv1", "conv1", loss, 2.0), HintPair("conv2", "conv2", "sp", 0.5))
    hints = HintConfiguration(pairs, classification_weight=0.7, logit_weight=0.3)
    teacher = plain_network(6, seed=1)
    whole = HintedStudent(plain_network(), hints, teacher, (1, 8, 8))
    whole.normalisers.copy_(torch.tensor([4.0, 0.25]))
    taught = TeacherPass(teacher, whole.teacher_layers, True, (1, 8, 8), Execution())
    assert with_meta.meta is not None
    assert isinstance(with_meta.meta, ImageSet)
    meta = DeviceImages(with_meta.meta, with_meta.preprocessing, torch.device("cpu"))
    settings = replace(SETTINGS, lr=1e-12, momentum=0.0)
    weighting = HintWeighting(whole, settings, 60, meta, 4, 0)
    with torch.no_grad():
        # A softmax of 1, 2 and 5 eighths, times three terms.
        weighting._network.last.bias.copy_(torch.tensor([1.0, 2.0, 5.0]).log())
    weighting.begin_epoch(1)
    outputs = taught(batches[0].teacher_images)
    total, losses = weighting.loss(Part(batches[0], outputs), 0.1)
    weighting.keep()
    assert losses.logit is not None
    expected = (
        0.7 * functional.cross_entropy(losses.logits, batches[0].labels)
        + 3 / 8 * 0.3 * losses.logit.mean()
        + 6 / 8 * 2.0 / 4.0 * losses.hints[0].mean()
        + 15 / 8 * 0.5 / 0.25 * losses.hints[1].mean()
    )
    torch.testing.assert_close(total, expected)
    assert list(weighting.metrics().values()) == pytest.approx([3 / 8, 6 / 8, 15 / 8], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_meta_images_are_balanced_and_of_the_training_images_only(tmp_path: Path, seed: int) -> None:
    for split, count in (("train", 80), ("test", 8)):
        numbers = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1) + np.zeros((1, 3, 4), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=numbers, labels=np.arange(count) % 4)
    spec = DataSpec(str(tmp_path), seed=seed)
    plain, found = (load_data(replace(spec, meta_images=count), tmp_path) for count in (0, 12))
    assert plain.meta is None

    def held(split: Any) -> list[int]:
        assert isinstance(split, ImageSet)
        return sorted(split.images[:, 0, 0, 0].tolist())

    assert np.bincount(found.meta.labels).tolist() == [3, 3, 3, 3]  # type: ignore[union-attr]
    assert np.bincount(found.train.labels).tolist() == [13, 13, 13, 13]
    assert sorted(held(found.meta) + held(found.train)) == held(plain.train)
    assert held(found.validation) == held(plain.validation)
    assert (found.mean, found.sd) == (plain.mean, plain.sd)


@pytest.mark.parametrize("count", [3, 33])
def test_number_of_meta_images_that_does_not_fit_is_an_error(tmp_path: Path, count: int) -> None:
    for split, images in (("train", 80), ("test", 8)):
        np.savez(
            tmp_path / f"{split}.npz", images=np.zeros((images, 3, 4), dtype=np.uint8), labels=np.arange(images) % 4
        )
    with pytest.raises(InputError) as caught:
        load_data(DataSpec(str(tmp_path), meta_images=count), tmp_path)
    assert str(caught.value) == (
        f"dynamic_weights.meta_images is {count}, but must be at least one for each of the 4 classes and at most half "
        "of the 64 training images; choose 4..32"
    )


WITH_DROPOUT = """
from torch import nn


def build(num_classes, in_channels):
    inner = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize(("loss", "student"), [("crd", "zoo"), ("crd", "dropout"), ("fitnet", "dropout")])
def test_weights_learn_from_the_very_losses_that_the_step_is_of(
    with_meta: DataSplits, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: str, student: str
) -> None:
    spec, layer = STUDENT, "layer1.0"
    if student == "dropout":
        file = tmp_path / "nets.py"
        file.write_text(WITH_DROPOUT)
        spec, layer = replace(STUDENT, name=f"{file}:build", width=1.0), "0"
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(self: MetaStep, losses: WeightedLosses, weights: Tensor, lr: float, again: Any, meta: Any) -> Tensor:
        with untracked_batch_norm(self._module):
            seen.append((losses.hints.detach(), again().detach()))
        return losses.rest.detach()

    monkeypatch.setattr(MetaStep, "__call__", watched)
    hints = HintConfiguration((HintPair("layer1.0", layer, loss, 1.0),), logit_weight=1.0, dynamic_weights=SETTINGS)
    trainer = Trainer(spec, with_meta, RECIPE, (2,), Seeds(1, 2), hints=hints, teacher=TeacherNetwork(teacher))
    for _ in trainer.epochs():
        pass
    assert len(seen) > 2
    for first, again in seen:
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-6)


def test_as_many_meta_images_are_set_aside_of_each_class_however_many_it_has(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [90, 30, 12])
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((132, 8, 8), np.uint8), labels=labels)
    splits = load_data(DataSpec(str(tmp_path), meta_images=11), tmp_path)
    assert splits.meta is not None
    assert np.bincount(splits.meta.labels).tolist() == [4, 4, 3]
    with pytest.raises(InputError, match=r"meta_images is 45, 15 of each class, but class 2 has 10 training images"):
        load_data(DataSpec(str(tmp_path), meta_images=45), tmp_path)
