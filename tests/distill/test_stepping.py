"""Epochs of batches for several students."""

import torch
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.stepping import MAIN, Given, Stepping
from hintsearch.distill.teacher_pass import TeacherPass
from torch import Tensor, nn

RECIPE = Recipe(batch_size=16, crop_padding=1)


def make(splits: DataSplits, init_seeds: tuple[int, ...] = (1, 2), data_seed: int = 3, at_once: int = 1) -> Stepping:
    train = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    return Stepping(train, RECIPE, data_seed, init_seeds, at_once)


def order(given: Given) -> Tensor:
    return given.batch.indices


def drawn(_given: Given) -> Tensor:
    """What a layer with dropout would draw."""
    return torch.rand(3)


def orders(stepping: Stepping, purpose: str, epoch: int) -> list[int]:
    (rows,) = stepping.epoch(purpose, epoch, None, lambda _: 0.0, [order])
    return torch.cat(rows).tolist()


def test_all_students_are_given_the_same_batches_step_by_step(splits: DataSplits) -> None:
    stepping, seen = make(splits), []

    def note(given: Given) -> Tensor:
        seen.append(given)
        return torch.tensor(given.lr)

    rows = stepping.epoch(MAIN, 1, None, lambda step: 0.5**step, [note, note])
    assert stepping.steps == 4
    assert [given.step for given in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(one is other for one, other in zip(seen[::2], seen[1::2], strict=True))
    assert [[float(lr) for lr in row] for row in rows] == [[1.0, 0.5, 0.25, 0.125]] * 2
    assert seen[0].taught is None


def test_teacher_sees_the_images_of_its_batch(splits: DataSplits, teacher: nn.Module) -> None:
    teacher_pass = TeacherPass(teacher, (), True, splits.image_shape, Execution())

    def errs(given: Given) -> Tensor:
        assert given.taught is not None
        assert given.taught.logits is not None
        return (given.taught.logits - teacher_pass(given.batch.teacher_images).logits).abs().max()

    (rows,) = make(splits, (1,)).epoch(MAIN, 1, teacher_pass, lambda _: 0.0, [errs])
    assert [float(row) for row in rows] == [0.0] * 4


def test_order_of_the_main_stage_is_that_of_the_data_seed(splits: DataSplits) -> None:
    train = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    expected = torch.cat([batch.indices for batch in train.epoch(2, 16, 3, RECIPE.augmentation)]).tolist()
    assert orders(make(splits, (1,)), MAIN, 2) == expected


def test_epochs_for_something_else_have_another_order(splits: DataSplits) -> None:
    stepping = make(splits, (1,))
    found = [orders(stepping, purpose, epoch) for purpose in (MAIN, "warmup", "other") for epoch in (1, 2)]
    assert all(sorted(one) == list(range(60)) for one in found)
    assert len(set(map(tuple, found))) == 6
    assert orders(stepping, "warmup", 1) == found[2]
    assert orders(make(splits, (1,), data_seed=4), "warmup", 1) != found[2]


def test_what_layers_draw_is_each_students_own_whoever_is_beside_it(splits: DataSplits) -> None:
    first, second = make(splits, (1, 2)).epoch(MAIN, 1, None, lambda _: 0.0, [drawn, drawn])
    (alone,) = make(splits, (2,)).epoch(MAIN, 1, None, lambda _: 0.0, [drawn])
    assert torch.equal(torch.stack(second), torch.stack(alone))
    every = torch.stack([*first, *second])
    assert len(every.unique(dim=0)) == len(every)


def test_what_layers_draw_depends_on_epoch_and_purpose(splits: DataSplits) -> None:
    stepping = make(splits, (1,))
    found = [
        torch.stack(stepping.epoch(purpose, epoch, None, lambda _: 0.0, [drawn])[0])
        for purpose, epoch in ((MAIN, 1), (MAIN, 2), ("warmup", 1))
    ]
    assert len(torch.cat(found).unique(dim=0)) == 12


def test_global_generator_is_left_as_it_was(splits: DataSplits) -> None:
    before = torch.get_rng_state()
    make(splits).epoch(MAIN, 1, None, lambda _: 0.0, [drawn, drawn])
    assert torch.equal(torch.get_rng_state(), before)


def test_students_at_once_see_every_batch(splits: DataSplits) -> None:
    stepping = make(splits, (1, 2, 3), at_once=2)
    rows = stepping.epoch(MAIN, 1, None, lambda _: 0.0, [order] * 3)
    expected = orders(make(splits, (1,)), MAIN, 1)
    assert [torch.cat(row).tolist() for row in rows] == [expected] * 3
