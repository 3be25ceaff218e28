import math
from dataclasses import asdict
from typing import Any

import pytest
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.models.errors import InputError


def test_defaults_are_those_of_the_specification() -> None:
    assert asdict(DynamicWeights()) == {
        "hidden": 100,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "ensemble": True,
        "meta": True,
        "meta_every": 1,
        "meta_images": 1000,
        "meta_batch_size": 64,
        "warmup_fraction": 0.1,
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden": 0}, "dynamic_weights.hidden is 0, but must be at least 1; choose 100"),
        ({"lr": 0.0}, "dynamic_weights.lr is 0, but must be above 0; choose 0.001"),
        ({"lr": math.nan}, "dynamic_weights.lr is nan, but must be above 0; choose 0.001"),
        ({"lr": math.inf}, "dynamic_weights.lr is inf, but must be above 0; choose 0.001"),
        ({"weight_decay": -1e-4}, "dynamic_weights.weight_decay is -0.0001, but must be at least 0; choose 0.0001"),
        ({"momentum": 1.0}, "dynamic_weights.momentum is 1, but must be at least 0 and below 1; choose 0.9"),
        ({"momentum": -0.1}, "dynamic_weights.momentum is -0.1, but must be at least 0 and below 1; choose 0.9"),
        ({"meta_every": 0}, "dynamic_weights.meta_every is 0, but must be at least 1; choose 1, or 5 to save time"),
        ({"meta_batch_size": 1}, "dynamic_weights.meta_batch_size is 1, but must be at least 2; choose 64"),
        (
            {"meta_images": 63},
            "dynamic_weights.meta_images is 63, but must be at least meta_batch_size, 64; "
            "choose 1000, or a smaller meta_batch_size",
        ),
        (
            {"warmup_fraction": 1.0},
            "dynamic_weights.warmup_fraction is 1, but must be at least 0 and below 1; choose 0.1",
        ),
    ],
)
def test_value_outside_its_range_is_told_with_rule_and_mend(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        DynamicWeights(**wrong)
    assert str(caught.value) == said


def test_values_at_the_ends_of_their_ranges_are_taken() -> None:
    least = {"hidden": 1, "weight_decay": 0.0, "momentum": 0.0, "meta_images": 2, "meta_batch_size": 2}
    settings = DynamicWeights(**least, warmup_fraction=0.0)
    assert asdict(settings).items() >= {**least, "warmup_fraction": 0.0}.items()


def test_without_ensembling_there_is_no_momentum() -> None:
    assert DynamicWeights(momentum=0.7).history_momentum == 0.7
    assert DynamicWeights(momentum=0.7, ensemble=False).history_momentum == 0.0


@pytest.mark.parametrize(
    ("fraction", "first_rung", "epochs"),
    [(0.1, 240, 24), (0.1, 30, 3), (0.1, 9, 0), (0.0, 240, 0), (0.999, 10, 9), (0.9999999999, 1, 0)],
)
def test_warm_up_is_whole_epochs_and_never_the_whole_rung(fraction: float, first_rung: int, epochs: int) -> None:
    assert DynamicWeights(warmup_fraction=fraction).warmup_epochs(first_rung) == epochs


def test_network_learns_in_every_so_many_steps_from_the_first_on() -> None:
    settings = DynamicWeights(meta_every=3)
    assert [step for step in range(8) if settings.updates_at(step)] == [0, 3, 6]
    assert not any(DynamicWeights(meta=False).updates_at(step) for step in range(8))
