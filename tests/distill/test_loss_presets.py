"""Published combinations of losses."""

import pytest
from hintsearch.distill.logit_losses import LOGIT_LOSSES
from hintsearch.distill.loss_names import check_hint_losses
from hintsearch.distill.loss_presets import LOSS_PRESETS, LossPreset

# The combinations of the paper, with RepDistiller's weights of each hint loss alone.
PUBLISHED = {
    "fitnet": ((("fitnet", 100.0),), "kd"),
    "at": ((("at", 1000.0),), "kd"),
    "vid": ((("vid", 1.0),), "kd"),
    "crd": ((("crd", 0.8),), "kd"),
    "wsl+at": ((("at", 1000.0),), "wsl"),
    "wsl+crd": ((("crd", 0.8),), "wsl"),
    "at+crd": ((("at", 1000.0), ("crd", 0.8)), "kd"),
}


def test_presets_are_the_published_combinations() -> None:
    assert LOSS_PRESETS.names() == tuple(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_losses_and_weights(name: str) -> None:
    hint, logit = PUBLISHED[name]
    assert LOSS_PRESETS.get(name) == LossPreset(hint, logit, logit_weight=1.0, temperature=4.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_losses_of_a_preset_exist(name: str) -> None:
    preset = LOSS_PRESETS.get(name)
    check_hint_losses("+".join(loss for loss, _ in preset.hint))
    assert preset.logit in LOGIT_LOSSES


def test_registry_says_what_a_preset_is_and_where_its_numbers_are_from() -> None:
    entry = LOSS_PRESETS.entry("at+crd")
    assert entry.facts["loss"] == "cross-entropy + kd + 1000·at + 0.8·crd, raw"
    assert "2103.00053" in entry.source
    assert "1910.10699" in entry.source
