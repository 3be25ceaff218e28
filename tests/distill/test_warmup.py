"""Which hint points a warm-up learns, in which order and for how long."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.warmup import Lesson, Warmup
from hintsearch.models.errors import InputError

PAIRS = (
    HintPair("layer1", "block1", "at", 2.0),
    HintPair("layer2", "block2", "sp", 0.5),
    HintPair("layer3", "block3", "fitnet", 3.0),
)


def epochs(warmup: Warmup) -> list[int]:
    """Of each lesson, in order."""
    return [lesson.epochs for lesson in warmup.curriculum(PAIRS)]


def test_hint_points_are_learned_from_shallow_to_deep_each_an_epoch_longer() -> None:
    # The published lengths of three layers: 3, 4 and 5 epochs.
    assert Warmup().curriculum(PAIRS) == tuple(
        Lesson(depth, HintPair(f"layer{depth}", f"block{depth}", "strongest_channels", 1.0), depth + 2)
        for depth in (1, 2, 3)
    )


def test_lessons_have_the_loss_of_the_warmup_and_no_weight_of_the_pairs() -> None:
    found = [lesson.pair for lesson in Warmup(loss="mse").curriculum(PAIRS)]
    assert [(pair.loss, pair.weight) for pair in found] == [("mse", 1.0)] * 3


@pytest.mark.parametrize("base", [0, 5])
def test_point_i_gets_i_epochs_more_than_the_base(base: int) -> None:
    assert epochs(Warmup(base_epochs=base)) == [base + 1, base + 2, base + 3]


@pytest.mark.parametrize(
    ("listed", "found"),
    [((4, 2, 7), [4, 2, 7]), ((4, 2), [4, 2, 2]), ((6,), [6, 6, 6]), ((1, 2, 3, 4), [1, 2, 3])],
)
def test_listed_epochs_come_before_the_base_and_further_points_get_the_last_number(
    listed: tuple[int, ...], found: list[int]
) -> None:
    assert epochs(Warmup(epochs=listed)) == found


def test_deep_to_shallow_turns_the_order_but_not_the_length_of_each_point() -> None:
    shallow = Warmup(epochs=(4, 2, 7)).curriculum(PAIRS)
    deep = Warmup(epochs=(4, 2, 7), order="deep_to_shallow").curriculum(PAIRS)
    assert deep == shallow[::-1]
    assert [lesson.depth for lesson in deep] == [3, 2, 1]


def test_two_losses_on_a_pair_are_one_lesson() -> None:
    both = [pair for one in PAIRS for pair in (one, replace(one, loss="crd", weight=0.1))]
    assert Warmup().curriculum(both) == Warmup().curriculum(PAIRS)


def test_one_teacher_layer_for_two_student_layers_is_two_lessons() -> None:
    pairs = (PAIRS[0], replace(PAIRS[0], student_layer="block2"))
    assert [lesson.pair.student_layer for lesson in Warmup().curriculum(pairs)] == ["block1", "block2"]


def test_pairs_of_weight_zero_are_learned_too() -> None:
    hints = HintConfiguration(pairs=tuple(replace(pair, weight=0.0) for pair in PAIRS), warmup=Warmup())
    assert hints.curriculum == Warmup().curriculum(PAIRS)
    assert hints.needs_teacher


def test_without_a_warmup_or_without_pairs_there_is_no_curriculum() -> None:
    assert HintConfiguration(pairs=PAIRS).curriculum == ()
    assert HintConfiguration(warmup=Warmup()).curriculum == ()
    assert not HintConfiguration(warmup=Warmup()).needs_teacher


@pytest.mark.parametrize("order", ["shallow_to_deep", "deep_to_shallow"])
@pytest.mark.parametrize(("warmup", "total"), [(Warmup(), 12), (Warmup(base_epochs=0), 6), (Warmup(epochs=(4, 1)), 6)])
def test_total_is_the_sum_of_the_lessons(warmup: Warmup, total: int, order: str) -> None:
    warmup = replace(warmup, order=order)
    assert sum(epochs(warmup)) == warmup.total_epochs(3) == total


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"order": "deep_to_shalow"},
            "warmup.order is 'deep_to_shalow'; did you mean 'deep_to_shallow'? (deep_to_shallow, shallow_to_deep)",
        ),
        ({"base_epochs": -1}, "warmup.base_epochs is -1, but must be at least 0; choose 2"),
        ({"epochs": (3, 0)}, "warmup.epochs has 0, but each must be at least 1; choose 3"),
        ({"lr": 0.0}, "warmup.lr is 0, but must be above 0; choose 0.001, or leave it out"),
        ({"lr": -0.1}, "warmup.lr is -0.1, but must be above 0; choose 0.001, or leave it out"),
        ({"lr": math.nan}, "warmup.lr is nan, but must be above 0; choose 0.001, or leave it out"),
    ],
)
def test_value_outside_its_range_is_told_with_rule_and_mend(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Warmup(**wrong)
    assert str(caught.value) == said


def test_epochs_out_of_a_file_are_a_tuple() -> None:
    listed: Any = [3, 4]
    assert Warmup(epochs=listed) == Warmup(epochs=(3, 4))
