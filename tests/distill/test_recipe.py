import math
from typing import Any

import pytest
from hintsearch.distill.batches import Augmentation
from hintsearch.distill.recipe import PRESETS, Recipe
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

RUNGS = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True).map(lambda ends: tuple(sorted(ends)))
SCHEDULES = st.sampled_from(["cosine", "step"])


@given(rungs=RUNGS, lr=st.floats(1e-4, 10), schedule=SCHEDULES)
@settings(deadline=None)
def test_learning_rate_starts_whole_at_every_rung(rungs: tuple[int, ...], lr: float, schedule: str) -> None:
    recipe = Recipe(lr=lr, schedule=schedule)
    assert [recipe.learning_rate(rungs, start) for start in (0, *rungs[:-1])] == [lr] * len(rungs)


@given(rungs=RUNGS, lr=st.floats(1e-4, 10))
@settings(deadline=None)
def test_cosine_goes_to_zero_at_the_end_of_every_rung(rungs: tuple[int, ...], lr: float) -> None:
    recipe = Recipe(lr=lr)
    ends = [recipe.learning_rate(rungs, end - 1e-4) for end in rungs]
    assert ends == pytest.approx([0] * len(rungs), abs=1e-6 * lr)
    assert recipe.learning_rate(rungs, rungs[-1]) == 0


@given(rungs=RUNGS, share=st.floats(0, 0.99))
@settings(deadline=None)
def test_cosine_is_one_of_the_share_of_the_rung(rungs: tuple[int, ...], share: float) -> None:
    recipe = Recipe(lr=1.0)
    for start, stop in zip((0, *rungs), rungs, strict=False):
        expected = (1 + math.cos(math.pi * share)) / 2
        found = recipe.learning_rate(rungs, start + share * (stop - start))
        assert found == pytest.approx(expected, abs=1e-9)


@given(rungs=RUNGS, decay=st.floats(0.01, 1))
@settings(deadline=None)
def test_step_falls_by_its_factor_after_each_share_of_the_rung(rungs: tuple[int, ...], decay: float) -> None:
    recipe = Recipe(lr=1.0, schedule="step", milestones=(0.25, 0.7), decay=decay)
    for start, stop in zip((0, *rungs), rungs, strict=False):
        found = [recipe.learning_rate(rungs, start + share * (stop - start)) for share in (0.24, 0.26, 0.69, 0.71)]
        assert found == pytest.approx([1, decay, decay, decay**2])


def test_step_falls_at_the_very_epoch() -> None:
    # In binary 0.07 · 100, 0.14 · 100, 0.28 · 100 and 0.55 · 100 are a hair above the whole number, 0.29 · 100 below.
    recipe = Recipe(lr=1.0, schedule="step", milestones=(0.07, 0.14, 0.28, 0.29, 0.55), decay=0.5)
    rates = [recipe.learning_rate((100,), epoch) for epoch in range(100)]
    assert [epoch for epoch in range(1, 100) if rates[epoch] < rates[epoch - 1]] == [7, 14, 28, 29, 55]


@pytest.mark.parametrize(("model", "lr"), [("resnet20", 0.05), ("vgg8", 0.05), ("MobileNetV2", 0.01)])
def test_preset_of_the_field_for_cifar(model: str, lr: float) -> None:
    # RepDistiller: 240 epochs, batches of 64, SGD of momentum 0.9 and weight decay 5e-4, ÷10 at 150, 180 and 210.
    preset = PRESETS.get("cifar_240")
    recipe = preset.recipe_of(model)
    rates = [recipe.learning_rate((preset.epochs,), epoch) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert rates == pytest.approx([lr, lr, lr / 10, lr / 10, lr / 100, lr / 100, lr / 1000, lr / 1000])
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay, recipe.batch_size) == (0.9, False, 5e-4, 64)
    assert recipe.augmentation == Augmentation(crop_padding=4, flip=True)


def test_preset_of_the_field_for_imagenet() -> None:
    # torchvision's resnets: 100 epochs, batches of 256, ÷10 every 30 epochs, weight decay 1e-4.
    preset = PRESETS.get("imagenet_100")
    recipe = preset.recipe_of("resnet20")
    rates = [recipe.learning_rate((preset.epochs,), epoch) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert (recipe.weight_decay, recipe.batch_size, recipe.nesterov) == (1e-4, 256, False)
    assert recipe.augmentation.min_crop_area == 0.08


def test_every_model_of_a_preset_is_one_of_the_zoo() -> None:
    named = {name for entry in PRESETS for name in entry.item.slow_models}
    assert named == {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
    assert all(name in MODELS for name in named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "recipe.schedule is 'cosin'; did you mean 'cosine'?"),
        ({"class_weights": "balance"}, "recipe.class_weights is 'balance'; did you mean 'balanced'?"),
    ],
)
def test_unknown_choice_is_an_error_with_the_nearest(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe(**changes)
    assert str(caught.value).startswith(message)


def test_milestones_out_of_a_file_are_those_of_code() -> None:
    milestones: Any = [0.625, 0.75, 0.875]
    assert Recipe(milestones=milestones) == Recipe()
    assert hash(Recipe(milestones=milestones)) == hash(Recipe())
