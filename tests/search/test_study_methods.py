"""The study's keys for warm-up, dynamic weights, combinations of losses, presets of losses and rankings."""

from pathlib import Path
from typing import Any

import pytest
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.loss_presets import LOSS_PRESETS
from hintsearch.distill.warmup import Warmup
from hintsearch.models.errors import InputError
from hintsearch.search.study import Study, validate_study
from hintsearch.search.study_types import RETRIEVAL_OBJECTIVES

TINY: dict[str, Any] = {"name": "tiny", "teacher": {"model": "resnet20"}, "student": {"model": "resnet8"}}
OPTIONAL = {"low": 0.1, "high": 1, "optional": True}
PRESETS = {
    "fitnet": ("fitnet", "kd", {"fitnet": 100}),
    "at": ("at", "kd", {"at": 1000}),
    "vid": ("vid", "kd", {"vid": 1}),
    "crd": ("crd", "kd", {"crd": 0.8}),
    "wsl+at": ("at", "wsl", {"at": 1000}),
    "wsl+crd": ("crd", "wsl", {"crd": 0.8}),
    "at+crd": ("at+crd", "kd", {"at": 1000, "crd": 0.8}),
}


def tiny(**content: Any) -> Study:
    return validate_study({**TINY, **content}, "tiny")


def refusal(**content: Any) -> str:
    with pytest.raises(InputError) as caught:
        tiny(**content)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("tiny: ")


def is_reloaded(study: Study) -> bool:
    return validate_study(study.resolved(), "again") == study


@pytest.mark.parametrize("written", ["indistill", {"method": "indistill"}, {}])
def test_warmup_by_its_method_has_the_published_values(written: Any) -> None:
    study = tiny(warmup=written)
    assert study.warmup is not None
    assert study.warmup.warmup() == Warmup("strongest_channels", 2, (), "shallow_to_deep", None)
    assert is_reloaded(study)


@pytest.mark.parametrize("key", ["warmup", "dynamic_weights"])
@pytest.mark.parametrize("written", ["none", None])
def test_none_is_no_section(key: str, written: Any) -> None:
    study = tiny(**{key: written})
    assert getattr(study, key) is None
    assert is_reloaded(study)


def test_values_of_a_warmup_are_the_trainer_s() -> None:
    study = tiny(warmup={"loss": "at", "epochs": [4, 2], "order": "deep_to_shallow", "lr": 0.02})
    assert study.warmup is not None
    assert study.warmup.warmup() == Warmup("at", 2, (4, 2), "deep_to_shallow", 0.02)
    assert is_reloaded(study)


@pytest.mark.parametrize("written", ["hkd", {"method": "hkd"}])
def test_dynamic_weights_by_their_method_have_the_usual_values(written: Any) -> None:
    study = tiny(dynamic_weights=written)
    assert study.dynamic_weights is not None
    assert study.dynamic_weights.dynamic_weights() == DynamicWeights()
    assert is_reloaded(study)


def test_values_of_dynamic_weights_are_the_trainer_s() -> None:
    study = tiny(dynamic_weights={"meta_every": 5, "ensemble": False, "meta_images": 200})
    assert study.dynamic_weights is not None
    assert study.dynamic_weights.dynamic_weights() == DynamicWeights(meta_every=5, ensemble=False, meta_images=200)


@pytest.mark.parametrize(("written", "set_aside"), [("none", 0), ("hkd", 1000), ({"meta_images": 70}, 70)])
def test_images_to_learn_weights_on_are_set_aside_with_dynamic_weights_only(written: Any, set_aside: int) -> None:
    assert tiny(dynamic_weights=written).data_spec().meta_images == set_aside


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"warmup": "indistil"}, "warmup.method is \"indistil\", but input should be 'indistill'; change warmup"),
        ({"warmup": False}, "warmup is false, but input should be a valid dictionary or instance of WarmupSection; "),
        ({"warmup": {"los": "at"}}, "unknown key 'warmup.los'; did you mean 'loss'? (base_epochs, epochs, loss, lr, "),
        ({"warmup": {"loss": "att"}}, "warmup.loss: unknown hint loss 'att'; did you mean 'at'?"),
        ({"warmup": {"loss": "at+sp"}}, "warmup.loss: 'at+sp' is several hint losses, but only one fits here; "),
        ({"warmup": {"order": "shallow"}}, "warmup.order: unknown order 'shallow'; did you mean 'shallow_to_deep'?"),
        ({"warmup": {"base_epochs": -1}}, "warmup.base_epochs is -1, but input should be greater than or equal to 0; "),
        ({"warmup": {"epochs": [3, 0]}}, "warmup.epochs.1 is 0, but input should be greater than or equal to 1; "),
        ({"warmup": {"lr": 0}}, "warmup.lr is 0, but input should be greater than 0; change warmup.lr"),
        (
            {"warmup": {"loss": "reviewkd"}},
            "warmup.loss is 'reviewkd', which is of all hint pairs together, but a warm-up learns one after the other; "
            "choose another, such as strongest_channels",
        ),
        ({"dynamic_weights": "hdk"}, "dynamic_weights.method is \"hdk\", but input should be 'hkd'; "),
        ({"dynamic_weights": {"hiden": 3}}, "unknown key 'dynamic_weights.hiden'; did you mean 'hidden'?"),
        ({"dynamic_weights": {"hidden": 2.5}}, "dynamic_weights.hidden is 2.5, but input should be a valid integer"),
        ({"dynamic_weights": {"hidden": 0}}, "dynamic_weights.hidden is 0, but must be at least 1; choose 100"),
        ({"dynamic_weights": {"lr": 0}}, "dynamic_weights.lr is 0, but must be above 0; choose 0.001"),
        ({"dynamic_weights": {"lr": float("nan")}}, "dynamic_weights.lr is NaN, but input should be a finite number"),
        (
            {"dynamic_weights": {"weight_decay": -1}},
            "dynamic_weights.weight_decay is -1, but must be at least 0; choose 0.0001",
        ),
        (
            {"dynamic_weights": {"momentum": 1}},
            "dynamic_weights.momentum is 1, but must be at least 0 and below 1; choose 0.9",
        ),
        ({"dynamic_weights": {"meta_every": 0}}, "dynamic_weights.meta_every is 0, but must be at least 1; choose 1, "),
        (
            {"dynamic_weights": {"meta_images": 50}},
            "dynamic_weights.meta_images is 50, but must be at least meta_batch_size, 64; choose 1000, or a smaller",
        ),
        (
            {"dynamic_weights": {"meta_batch_size": 1}},
            "dynamic_weights.meta_batch_size is 1, but must be at least 2; choose 64",
        ),
        (
            {"dynamic_weights": {"warmup_fraction": 1}},
            "dynamic_weights.warmup_fraction is 1, but must be at least 0 and below 1; choose 0.1",
        ),
        ({"recipe": {"optimizer": "adm"}}, "recipe.optimizer: unknown optimizer 'adm'; did you mean 'adam'? (adam, sg"),
        ({"space": {"preset": "at+crdd"}}, "space.preset: unknown loss preset 'at+crdd'; did you mean 'at+crd'?"),
        ({"space": {"preset": "at", "weight": 3}}, "space.weight is 3, but input should be a valid dictionary"),
        (
            {"space": {"loss": {"hint": ["at", "fitnet+atx"]}}},
            "space.loss.hint.1: unknown hint loss 'atx'; did you mean 'at'?",
        ),
        ({"space": {"loss": {"hint": "at+"}}}, "space.loss.hint.0: unknown hint loss ''; "),
        (
            {"space": {"loss": {"hint": "at+sp+at"}}},
            "space.loss.hint.0: 'at+sp+at' has 'at' twice, but each may stand once; remove one",
        ),
        ({"space": {"loss": {"hint": ["at+sp", "at+sp"]}}}, "space.loss.hint: 'at+sp' is listed twice, but each may "),
        (
            {"space": {"loss": {"embedding": "at+sp"}}},
            "space.loss: embedding has 'at+sp', but takes one hint loss at a time; name them separately",
        ),
        ({"space": {"loss": {"logit": "kd+wsl"}}}, "space.loss.logit.0: unknown logit loss 'kd+wsl'; "),
        (
            {"space": {"weight": {"by_loss": {"fitnt": 1}}}},
            "space.weight.by_loss.fitnt: unknown hint loss 'fitnt'; did you mean 'fitnet'?",
        ),
        (
            {"space": {"weight": {"by_loss": {"at+sp": 1}}}},
            "space.weight.by_loss.at+sp: 'at+sp' is several hint losses, but only one fits here; name one",
        ),
        (
            {"space": {"weight": {"by_loss": {"at": {"low": 2, "high": 1}}}}},
            "space.weight.by_loss.at: low is 2, but must not be above high, 1; swap them",
        ),
    ],
)
def test_mistake_is_one_line_with_key_value_rule_and_mend(content: dict[str, Any], message: str) -> None:
    assert refusal(**content).startswith(message)


def test_every_preset_of_losses_is_tested() -> None:
    assert set(PRESETS) == {entry.name for entry in LOSS_PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("elsewhere", [True, False])
def test_preset_replaces_losses_and_weights_whatever_the_study_says(preset: str, elsewhere: bool) -> None:
    said = {
        "normalise": True,
        "temperature": {"low": 1, "high": 8},
        "loss": {"hint": ["sp", "mse"], "logit": ["dkd"], "embedding": "cosine"},
        "weight": {"hint": 0, "by_loss": {"sp": 3}, "logit": 0, "classification": 0, "embedding": 0.3},
    }
    space = tiny(space={"preset": preset, **(said if elsewhere else {})}).space
    hint, logit, by_loss = PRESETS[preset]
    assert (space.loss.hint, space.loss.logit) == ((hint,), (logit,))
    assert {name: (span.low, span.high) for name, span in space.weight.by_loss.items()} == {
        name: (weight, weight) for name, weight in by_loss.items()
    }
    fixed = space.weight.logit, space.weight.classification, space.temperature
    assert [(span.low, span.high) for span in fixed] == [(1, 1), (1, 1), (4, 4)]
    assert not space.normalise
    # The penultimate features are no part of it.
    assert space.weight.embedding.high == (0.3 if elsewhere else 0)
    assert space.loss.embedding == (("cosine",) if elsewhere else ("pkt_symmetric",))


@pytest.mark.parametrize("preset", PRESETS)
def test_study_with_a_preset_of_losses_is_the_same_when_it_is_read_again(preset: str) -> None:
    assert is_reloaded(tiny(space={"preset": preset, "weight": {"embedding": OPTIONAL}}))


def test_preset_leaves_the_hint_points_to_the_study() -> None:
    assert tiny(space={"preset": "at", "hints": {"clusters": 2}}).space.hints.clusters.high == 2


def test_combination_is_one_of_the_choices() -> None:
    study = tiny(space={"loss": {"hint": ["at+crd", "fitnet"]}})
    assert study.space.loss.hint == ("at+crd", "fitnet")
    assert study.losses() == ("kd", "at", "crd", "fitnet", "pkt_symmetric")
    assert is_reloaded(study)


def test_range_of_a_loss_stands_in_the_place_of_the_common_one() -> None:
    by_loss = {"crd": {"low": 0.5, "high": 2}}
    weight = tiny(space={"loss": {"hint": ["at", "crd"]}, "weight": {"by_loss": by_loss}}).space.weight
    assert (weight.of_hint("crd").low, weight.of_hint("crd").high) == (0.5, 2)
    assert weight.of_hint("at") == weight.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"weight": {"by_loss": {"vid": 3}}}},
            "space.weight.by_loss has 'vid', which is not in space.loss.hint; choose one of",
        ),
        (
            {"space": {"loss": {"embedding": "crd"}}},
            "space.loss.embedding is ['crd'], but space.weight.embedding is 0, which leaves it out; set",
        ),
        (
            {"warmup": {"epochs": [3, 4], "base_epochs": 7}},
            "warmup.base_epochs is 7, but warmup.epochs says how long each lesson is; remove one",
        ),
        (
            {"space": {"loss": {"hint": ["fsp"]}, "weight": {"logit": 0}}, "dynamic_weights": "hkd"},
            "dynamic_weights share weight among at least 2 distillation terms, but no configuration",
        ),
    ],
)
def test_key_that_would_change_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


@pytest.mark.parametrize("metric", RETRIEVAL_OBJECTIVES)
def test_classification_may_be_left_out_where_rankings_decide(metric: str) -> None:
    study = tiny(objective={"metric": metric}, space={"weight": {"classification": 0}})
    assert not study.space.weight.classification.high


@pytest.mark.parametrize("metric", ["val_accuracy", "val_macro_f1"])
def test_classification_may_not_be_left_out_where_a_classifier_decides(metric: str) -> None:
    assert refusal(objective={"metric": metric}, space={"weight": {"classification": 0}}) == (
        f"space.weight.classification may be 0, but {metric} needs a trained classifier; set it to 1, or the objective "
        "to val_map_cosine"
    )


NOTHING = {"classification": 0, "logit": OPTIONAL, "hint": OPTIONAL, "embedding": OPTIONAL}


@pytest.mark.parametrize("by_loss", [{}, {"at": 0}, {"at": OPTIONAL, "sp": OPTIONAL}])
def test_space_in_which_nothing_may_be_learned_is_refused(by_loss: dict[str, Any]) -> None:
    space = {"loss": {"hint": ["at", "sp"]}, "weight": {**NOTHING, "by_loss": by_loss}}
    assert refusal(objective={"metric": "val_map_l2"}, space=space) == (
        "space.weight lets every loss be 0 at once, and then there is nothing to learn; let one of them be always on"
    )


@pytest.mark.parametrize(
    ("hint", "by_loss", "fits"),
    [
        (["at"], {"at": 1}, True),
        (["at+sp"], {"sp": {"low": 0.1, "high": 1}}, True),
        (["at+sp", "sp"], {"sp": 1}, True),
        (["at+sp", "at"], {"sp": 1}, False),
    ],
)
def test_a_loss_that_is_always_on_is_enough_to_learn(hint: list[str], by_loss: dict[str, Any], fits: bool) -> None:
    content: dict[str, Any] = {"objective": {"metric": "val_map_l2"}}
    content["space"] = {"loss": {"hint": hint}, "weight": {**NOTHING, "by_loss": by_loss}}
    assert tiny(**content) if fits else refusal(**content)


def test_every_single_loss_that_is_always_on_is_enough_to_learn() -> None:
    for name in NOTHING:
        tiny(objective={"metric": "val_map_l2"}, space={"weight": {**NOTHING, name: 1}})


@pytest.mark.parametrize(
    ("space", "fits"),
    [
        ({"weight": {"logit": 0, "hint": 1}, "hints": {"clusters": 1}}, False),
        ({"weight": {"logit": 0, "hint": 1}, "hints": {"clusters": 2}}, True),
        ({"weight": {"logit": 0, "hint": 1}, "hints": {"clusters": {"low": 1, "high": 2}}}, True),
        ({"weight": {"logit": 0, "hint": 1}, "hints": {"clusters": "auto"}}, True),
        ({"weight": {"logit": 0, "hint": 1}, "hints": {"clusters": 1}, "loss": {"hint": ["at", "at+sp"]}}, True),
        ({"weight": {"logit": OPTIONAL, "hint": 1}, "hints": {"clusters": 1}}, True),
        ({"weight": {"logit": 0, "hint": 1, "embedding": OPTIONAL}, "hints": {"clusters": 1}}, True),
        ({"weight": {"logit": 1, "hint": 0}}, False),
        ({"weight": {"logit": 1, "hint": 0, "by_loss": {"fitnet": 1}}, "hints": {"clusters": 1}}, True),
        ({"weight": {"logit": 0, "by_loss": {"fitnet": 0, "at": 0, "sp": 0}}}, False),
        ({"weight": {"logit": 1, "hint": 0, "embedding": 1}}, True),
        ({"preset": "at", "weight": {"hint": 0}, "hints": {"clusters": 1}}, True),
    ],
)
def test_dynamic_weights_need_a_space_in_which_two_terms_read_the_teacher(space: dict[str, Any], fits: bool) -> None:
    if fits:
        assert tiny(space=space, dynamic_weights="hkd").dynamic_weights
        return
    assert refusal(space=space, dynamic_weights="hkd") == (
        "dynamic_weights share weight among at least 2 distillation terms, but no configuration of this space has as "
        "many; let space.weight.logit be above 0, or add hint losses or clusters"
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_optimizer_is_the_recipe_s(optimizer: str) -> None:
    study = tiny(recipe={"optimizer": optimizer})
    assert study.recipe.recipe().optimizer == optimizer
    assert is_reloaded(study)


def test_optimizer_of_the_teacher_is_its_own() -> None:
    study = tiny(teacher={"model": "resnet20", "recipe": {"optimizer": "adam"}})
    assert (study.teacher.recipe.optimizer, study.recipe.optimizer) == ("adam", "sgd")


@pytest.fixture
def own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with two files of losses that must not run when a study is read."""
    monkeypatch.chdir(tmp_path)
    for place in (Path("mine.py"), Path("c++") / "mine.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("raise SystemExit('it ran')")
    return tmp_path


def test_own_losses_become_absolute_wherever_they_are_named(own_losses: Path) -> None:
    mine = f"{own_losses}/mine.py"
    study = tiny(
        space={
            "loss": {"hint": ["mine.py:one+at"], "logit": "mine.py:two", "embedding": "mine.py:three"},
            "weight": {"by_loss": {"mine.py:one": 3}, "embedding": 1},
        },
        warmup={"loss": "mine.py:four"},
    )
    assert study.space.loss.hint == (f"{mine}:one+at",)
    assert study.space.weight.of_hint(f"{mine}:one").low == 3
    assert study.own_code() == {f"loss {name}": f"{mine}:{name}" for name in ("two", "one", "three", "four")}
    assert is_reloaded(study)


def test_own_losses_of_one_name_in_two_files_are_both_shown(own_losses: Path) -> None:
    Path("others").mkdir()
    Path("others/mine.py").touch()
    study = tiny(space={"loss": {"hint": ["mine.py:own", "others/mine.py:own"]}})
    names = f"{own_losses}/mine.py:own", f"{own_losses}/others/mine.py:own"
    assert study.own_code() == dict(zip(("loss own", "loss own 2"), names, strict=True))


def test_own_loss_named_in_two_ways_is_the_same_loss(own_losses: Path) -> None:
    mine = f"{own_losses}/mine.py:own"
    said = f"{mine!r} is listed twice, but each may stand once; remove one"
    assert refusal(space={"loss": {"hint": "mine.py:own+./mine.py:own"}}) == f"space.loss.hint.0: {said}"
    assert refusal(space={"loss": {"hint": ["mine.py:own", "./mine.py:own"]}}) == f"space.loss.hint: {said}"


def test_own_loss_below_a_folder_with_a_plus_is_refused(own_losses: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absolute path, which every process gets, would be read as two losses."""
    monkeypatch.chdir("c++")
    assert refusal(space={"loss": {"hint": "mine.py:own"}}) == (
        f"space.loss.hint.0: '{own_losses}/c++/mine.py:own' has a '+' in its path, which stands between hint losses; "
        "move it to another folder"
    )


def test_own_loss_that_is_nowhere_is_refused(own_losses: Path) -> None:
    assert refusal(space={"loss": {"hint": "at+gone.py:own"}}).startswith(
        "space.loss.hint.0: hint loss 'gone.py:own': there is no file gone.py; "
    )
