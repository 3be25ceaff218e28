import math

import numpy as np
import pytest
import torch
from golden_losses import GOLDEN
from hint_cases import LABELS, Array, features, make_loss, run, run_parts, same_draws, samples_of, value
from hintsearch.distill import contrastive_loss
from hintsearch.distill.contrastive_loss import ContrastiveRepresentationDistillation
from hintsearch.distill.losses import FeatureShape, Samples
from hintsearch.models.errors import InputError
from scipy.stats import chisquare
from torch import Tensor

MEMORIES = ("student_memory", "teacher_memory")
BATCH = 4
STUDENT, TEACHER = features((BATCH, 3, 2, 2), 1), features((BATCH, 5, 3, 3), 2)


def crd(labels: Tensor = LABELS, seed: int = 0) -> ContrastiveRepresentationDistillation:
    """In float64; it remembers."""
    with same_draws(seed):
        loss = ContrastiveRepresentationDistillation(FeatureShape(3, 2, 2), FeatureShape(5, 3, 3))
        loss.read_training_set(labels)
    return loss.double()


def state(loss: ContrastiveRepresentationDistillation) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in loss.state_dict().items()}


def one_step(loss: ContrastiveRepresentationDistillation, seed: int = 1) -> float:
    student, teacher = features(STUDENT.shape, seed), features(TEACHER.shape, seed + 50)
    return value(loss, student, teacher)


def units(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize("labels", [[0, 1, 2, 2, 1, 0, 2, 1, 2], [5, 2, 5, 2, 2, 7]], ids=["all classes", "some"])
def test_negatives_are_uniform_over_the_images_of_other_classes(labels: list[int]) -> None:
    known = torch.tensor(labels)
    loss = crd(known)
    for label in known.unique():
        with same_draws(7):
            drawn = loss._negatives(label.expand(500))
        counts = torch.bincount(drawn.flatten(), minlength=len(labels))
        others = known != label
        assert counts[~others].sum() == 0
        # A correct draw fails this once in ten thousand; the seed is fixed.
        assert chisquare(counts[others].numpy()).pvalue > 1e-4


def test_negatives_of_each_image_are_drawn_by_its_own_class() -> None:
    with same_draws(7):
        drawn = crd()._negatives(LABELS)
    assert (LABELS[drawn] != LABELS[:, None]).all()
    assert len({tuple(row) for row in drawn.tolist()}) == len(LABELS)


@pytest.mark.parametrize(("most", "count"), [(5, 5), (len(LABELS), len(LABELS)), (16384, len(LABELS))])
def test_there_are_no_more_negatives_than_images(monkeypatch: pytest.MonkeyPatch, most: int, count: int) -> None:
    monkeypatch.setattr(ContrastiveRepresentationDistillation, "NEGATIVES", most)
    assert crd()._negatives(LABELS[:2]).shape == (2, count)


@pytest.mark.parametrize("negatives", [1, 5, 16384])
def test_crd_of_several_batches_is_its_formula(monkeypatch: pytest.MonkeyPatch, negatives: int) -> None:
    monkeypatch.setattr(ContrastiveRepresentationDistillation, "NEGATIVES", negatives)
    loss = crd()
    for seed in (1, 2, 3):
        student, teacher = features(STUDENT.shape, seed), features(TEACHER.shape, seed + 50)
        expected = GOLDEN["crd"](loss, [student], [teacher])
        assert value(loss, student, teacher) == pytest.approx(expected, rel=1e-12)


def test_crd_has_a_closed_form_where_all_scores_are_equal() -> None:
    loss = crd()
    for name in MEMORIES:
        loss.get_buffer(name).zero_()
    images = len(LABELS)
    # The paper's h = p / (p + K/N), here with p = 1/N and as many negatives as images.
    share = 1 / images
    expected = 2 * (-math.log(share / (share + 1)) - images * math.log(1 / (share + 1)))
    assert one_step(loss) == pytest.approx(expected, rel=1e-5)


def test_memories_begin_with_directions_of_about_unit_length() -> None:
    loss = crd(torch.arange(2000) % 7)
    first, second = (loss.get_buffer(name) for name in MEMORIES)
    bound = 1 / math.sqrt(128 / 3)
    for memory in (first, second):
        assert memory.shape == (2000, 128)
        assert memory.abs().max() <= bound
        assert memory.mean().abs() < 1e-3
        assert memory.norm(dim=1).mean().item() == pytest.approx(1, rel=0.01)
    assert (first * second).sum(dim=1).mean().abs() < 0.01


def test_memories_move_to_the_new_embeddings_and_keep_unit_length() -> None:
    loss = crd()
    loss.MOMENTUM = 0.8
    before = state(loss)
    run(loss, [torch.from_numpy(STUDENT)], [torch.from_numpy(TEACHER)])
    seen = samples_of(BATCH).indices
    embedded = loss.adapt(torch.from_numpy(STUDENT), torch.from_numpy(TEACHER))
    for name, vectors in zip(MEMORIES, embedded, strict=True):
        after = loss.get_buffer(name)
        expected = units(0.8 * before[name][seen] + 0.2 * units(vectors.detach()))
        torch.testing.assert_close(after[seen], expected)
        unseen = torch.ones(len(LABELS), dtype=torch.bool)
        unseen[seen] = False
        assert torch.equal(after[unseen], before[name][unseen])
        assert not after.requires_grad


def test_the_momentum_is_that_of_the_paper() -> None:
    assert crd().MOMENTUM == 0.5


def test_partitions_are_those_of_the_first_batch() -> None:
    loss = crd()
    assert loss.partitions.tolist() == [0, 0]
    memories = state(loss)
    embedded = loss.adapt(torch.from_numpy(STUDENT), torch.from_numpy(TEACHER))
    with same_draws():
        chosen = torch.cat([samples_of(BATCH).indices[:, None], loss._negatives(samples_of(BATCH).labels)], dim=1)
    value(loss, STUDENT, TEACHER)
    first = loss.partitions.clone()
    # The student among the teacher's, and the other way round.
    for found, vectors, name in zip(first, embedded, reversed(MEMORIES), strict=True):
        products = torch.einsum("bd,bkd->bk", units(vectors), memories[name][chosen])
        assert float(found) == pytest.approx(float((products / 0.07).exp().mean().detach()) * len(LABELS), rel=1e-12)
    for seed in (1, 2):
        one_step(loss, seed)
        assert torch.equal(loss.partitions, first)


def test_what_only_tries_changes_no_buffer_and_gives_the_same() -> None:
    trying, remembering = crd(), crd()
    trying.remembers = False
    for seed in (1, 2):
        before = state(trying)
        tried = one_step(trying, seed)
        assert all(torch.equal(values, before[name]) for name, values in state(trying).items())
        assert tried == one_step(remembering, seed)
        trying.load_state_dict(remembering.state_dict())


def look(loss: ContrastiveRepresentationDistillation, samples: Samples, seed: int) -> None:
    """A pass over the images of these indices."""
    student, teacher = (
        torch.from_numpy(features((len(samples.labels), *shape), seed)) for shape in ((3, 2, 2), (5, 3, 3))
    )
    with same_draws():
        loss(student, teacher, samples)


def halves() -> tuple[Samples, Samples]:
    indices = torch.arange(BATCH)
    return Samples(indices[:2], LABELS[:2]), Samples(indices[2:], LABELS[2:BATCH])


def test_each_batch_that_was_only_tried_is_caught_up_with() -> None:
    trying, remembering = crd(), crd()
    trying.remembers = False
    for seed, part in enumerate(halves()):
        look(trying, part, seed)
        look(remembering, part, seed)
    trying.catch_up()
    for name in MEMORIES:
        assert torch.equal(state(trying)[name], state(remembering)[name])


def test_of_several_passes_over_a_batch_the_first_is_caught_up_with() -> None:
    trying, once = crd(), crd()
    trying.remembers = once.remembers = False
    part, _ = halves()
    for seed in (1, 2, 3):
        look(trying, part, seed)
    look(once, part, 1)
    for loss in (trying, once):
        loss.catch_up()
        loss.catch_up()
    assert all(torch.equal(values, state(once)[name]) for name, values in state(trying).items())


def test_constants_are_those_of_the_first_batch_that_is_caught_up_with() -> None:
    both, first = crd(), crd()
    both.remembers = False
    for seed, part in enumerate(halves()):
        look(both, part, seed)
    both.catch_up()
    look(first, halves()[0], 0)
    assert torch.equal(both.partitions, first.partitions)


def test_what_is_forgotten_is_not_caught_up_with() -> None:
    loss = crd()
    loss.remembers = False
    before = state(loss)
    look(loss, halves()[0], 1)
    loss.forget()
    loss.catch_up()
    assert all(torch.equal(values, before[name]) for name, values in state(loss).items())


def gradients(loss: ContrastiveRepresentationDistillation) -> list[Tensor]:
    student = torch.from_numpy(STUDENT).requires_grad_()
    result = run(loss, [student], [torch.from_numpy(TEACHER)])
    return list(torch.autograd.grad(result, [student, *loss.parameters()]))


def test_gradient_does_not_see_that_the_memories_change() -> None:
    remembering, trying = crd(), crd()
    trying.remembers = False
    for one, other in zip(gradients(remembering), gradients(trying), strict=True):
        assert torch.equal(one, other)


def test_gradient_of_the_first_batch_takes_the_partitions_for_constants() -> None:
    first, later = crd(), crd()
    found = gradients(first)
    later.partitions.copy_(first.partitions)
    for one, other in zip(found, gradients(later), strict=True):
        assert torch.equal(one, other)


def test_both_ways_to_the_scores_agree_in_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with the whole memory, and with only those that were drawn."""
    monkeypatch.setattr(ContrastiveRepresentationDistillation, "NEGATIVES", 5)
    found = []
    for cheaper_whole in (0, 1000):
        monkeypatch.setattr(contrastive_loss, "_CHEAPER_WHOLE", cheaper_whole)
        loss = crd()
        one_step(loss, 9)
        student = torch.from_numpy(STUDENT).requires_grad_()
        result = run(loss, [student], [torch.from_numpy(TEACHER)])
        result.backward()
        assert student.grad is not None
        found.append((result.detach(), student.grad, *state(loss).values()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_state_dict_continues_where_it_was_saved() -> None:
    loss, other = crd(), crd(seed=3)
    for seed in (1, 2):
        one_step(loss, seed)
    assert one_step(other, 1) != one_step(loss, 1)
    other.load_state_dict(loss.state_dict())
    for seed in (3, 4):
        assert one_step(other, seed) == one_step(loss, seed)
    assert all(torch.equal(values, state(loss)[name]) for name, values in state(other).items())


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [4, 4]])
def test_a_training_set_of_one_class_is_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match="all training images are of one"):
        crd(torch.tensor(labels))


def test_crd_gives_a_loss_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's is that of a batch of it alone, with the same negatives and constants."""
    loss = crd()
    one_step(loss)
    loss.remembers = False
    given = [torch.from_numpy(STUDENT)], [torch.from_numpy(TEACHER)]
    whole = run_parts(loss, *given)
    assert whole.shape == (BATCH,)
    samples = samples_of(BATCH)
    embedded = loss.adapt(*given[0], *given[1])
    with same_draws():
        negatives = loss._negatives(samples.labels)
    for image in range(BATCH):
        one = slice(image, image + 1)
        monkeypatch.setattr(loss, "_negatives", lambda _labels, one=one: negatives[one])
        of_one = Samples(samples.indices[one], samples.labels[one])
        alone = loss.compare_samples(embedded[0][one], embedded[1][one], of_one)
        assert alone.item() == pytest.approx(whole[image].item(), rel=1e-12)


def aligned(order: list[int]) -> float:
    """After some batches, of a student that embeds the teacher's images in this order."""
    teacher = features((BATCH, 3, 2, 2), 1)
    loss = make_loss("crd", teacher, teacher)
    loss.get_submodule("teacher_embedding").load_state_dict(loss.get_submodule("student_embedding").state_dict())
    student: Array = teacher[order]
    loss.remembers = True
    for _ in range(4):
        value(loss, teacher, teacher)
    return value(loss, student, teacher)


def test_crd_of_aligned_embeddings_is_lower_than_of_others() -> None:
    straight = aligned([0, 1, 2, 3])
    others = [aligned(order) for order in ([1, 0, 3, 2], [3, 2, 1, 0], [1, 2, 3, 0])]
    assert straight < min(others)


def test_crd_learns_which_images_are_the_same() -> None:
    loss = crd()
    optimiser = torch.optim.SGD(loss.parameters(), 0.1)
    given = [torch.from_numpy(STUDENT)], [torch.from_numpy(TEACHER)]
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        found = run(loss, *given)
        found.backward()
        optimiser.step()
        losses.append(found.item())
    assert losses[-1] < 0.8 * losses[0]
    assert np.isfinite(losses).all()
