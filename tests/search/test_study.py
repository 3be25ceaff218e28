from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.study import Study, load_study, validate_study

TINY: dict[str, Any] = {"name": "tiny", "teacher": {"model": "resnet20"}, "student": {"model": "resnet8"}}


def tiny(key: str = "seed", value: Any = 0) -> Study:
    """A study of few words in which one key, given with dots, has another value."""
    content: Any = value
    for part in reversed(key.split(".")):
        content = {part: content}
    return validate_study({**TINY, **content}, "tiny")


def refusal(key: str, value: Any) -> str:
    with pytest.raises(InputError) as caught:
        tiny(key, value)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("tiny: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("budgets", {}, "unknown key 'budgets'; did you mean 'budget'? (budget, confirm, controls, data, "),
        ("budget.trial", 3, "unknown key 'budget.trial'; did you mean 'trials'? (checkpoint_seconds, failures, "),
        ("space.weight.hint", {"lo": 1, "high": 2}, "unknown key 'space.weight.hint.lo'; did you mean 'low'? (default"),
        ("space.lr", {"low": 1, "hihg": 2}, "unknown key 'space.lr.hihg'; did you mean 'high'? (default, high, low"),
        ("budget.trials", "many", 'budget.trials is "many", but input should be a valid integer, '),
        ("budget.trials", 2.5, "budget.trials is 2.5, but input should be a valid integer, "),
        ("budget.trials", None, "budget.trials is null, but input should be a valid integer; change budget.trials"),
        ("budget", 3, "budget is 3, but input should be a valid dictionary"),
        ("budget.rungs", 8, "budget.rungs is 8, but input should be a valid tuple; change budget.rungs"),
        ("name", {}, "name is {}, but input should be a valid string; change name"),
        ("name", "a b", 'name is "a b", but string should match pattern \'^[A-Za-z0-9]'),
        ("name", "x" * 101, f'name is "{"x" * 56}..., but string should have at most 100 characters; change name'),
        ("seed", -1, "seed is -1, but input should be greater than or equal to 0; change seed"),
        ("budget.trials", 0, "budget.trials is 0, but input should be greater than or equal to 1; "),
        ("budget.reduction", 1, "budget.reduction is 1, but input should be greater than 1; "),
        ("data.train_fraction", 1.5, "data.train_fraction is 1.5, but input should be less than or equal to 1; "),
        ("data.sd", [0.0], "data.sd.0 is 0.0, but input should be greater than 0; "),
        ("recipe.momentum", 1, "recipe.momentum is 1, but input should be less than 1; "),
        ("resources.cpus_per_trial", 0, "resources.cpus_per_trial is 0, but input should be greater than or equal"),
        ("recipe.lr", float("nan"), "recipe.lr is NaN, but input should be a finite number; change recipe.lr"),
        ("recipe.lr", float("inf"), "recipe.lr is Infinity, but input should be a finite number; change recipe.lr"),
        ("space.weight.hint", float("inf"), "space.weight.hint.low is Infinity, but input should be a finite number; "),
        ("space.weight.hint", float("nan"), "space.weight.hint.low is NaN, but input should be a finite number; "),
        ("space.lr", {"low": 0.1, "high": float("inf")}, "space.lr.high is Infinity, but input should be a finite"),
        ("teacher.model", "resnet200", "teacher.model: unknown model 'resnet200'; did you mean 'resnet20'? (resnet110"),
        ("teacher.model", "my.py:net", "teacher.model: model 'my.py:net': there is no file my.py; "),
        (
            "space.loss.hint",
            ["fitnets"],
            "space.loss.hint.0: unknown hint loss 'fitnets'; did you mean 'fitnet'? (ab, at, ",
        ),
        (
            "space.loss.logit",
            "kdk",
            "space.loss.logit.0: unknown logit loss 'kdk'; did you mean 'kd'? (dist, dkd, kd, kd_standardised, wsl)",
        ),
        ("space.loss.logit", ["kd", "kd"], "space.loss.logit: 'kd' is listed twice, but each may stand once; "),
        ("space.loss.hint", ["at", "sp", "at"], "space.loss.hint: 'at' is listed twice, but each may stand once; "),
        ("space.loss.hint", [], "space.loss.hint is [], but value should have at least 1 item"),
        ("layers.metrics", ["r2_cca", "cka_liner"], "layers.metrics.1: unknown layer metric 'cka_liner'; did you mean"),
        ("space.hints.selectors", ["kmedoid"], "space.hints.selectors.0: unknown selector 'kmedoid'; did you mean 'km"),
        ("controls.arms", ["stage_end"], "controls.arms.0: unknown control arm 'stage_end'; did you mean 'stage_ends'"),
        ("objective.metric", "val_acc", "objective.metric: unknown objective 'val_acc'; did you mean 'val_accuracy'?"),
        ("objective.direction", "up", "objective.direction is \"up\", but input should be 'maximize' or 'minimize'; "),
        (
            "data.name",
            "digit",
            "data.name: unknown data set 'digit'; did you mean 'digits'? (cifar10, cifar100, cub200, digits",
        ),
        (
            "space.weight.hint",
            {"low": 2, "high": 1},
            "space.weight.hint: low is 2, but must not be above high, 1; swap",
        ),
        (
            "space.hints.clusters",
            {"low": 5, "high": 2},
            "space.hints.clusters: low is 5, but must not be above high, 2",
        ),
        ("space.hints.clusters", 0, "space.hints.clusters.low is 0, but input should be greater than or equal to 1; "),
        ("space.weight.hint", {"low": 0, "high": 1}, "space.weight.hint: low is 0, but the range is searched log-unif"),
        ("space.weight.hint", {"low": -1, "high": 1}, "space.weight.hint.low is -1, but input should be greater than "),
        (
            "space.weight.hint",
            {"low": 1, "high": 2, "default": 3},
            "space.weight.hint: default is 3, but must lie in 1..2; change it",
        ),
        ("space.temperature", 0, "space.temperature.low is 0, but input should be greater than 0; "),
        ("space.lr", 0, "space.lr.low is 0, but input should be greater than 0; "),
        ("space.temperature", {"low": 1, "high": 8, "optional": True}, "space.temperature.optional is true, but input"),
        ("budget.rungs", [24, 8], "budget: rungs are [24, 8], but must be increasing; sort them"),
        ("budget.rungs", [8, 8], "budget: rungs are [8, 8], but must be increasing; sort them"),
        ("budget.rungs", [], "budget.rungs is [], but tuple should have at least 1 item"),
        ("recipe.momentum", 0, "recipe.nesterov is true, but recipe.momentum is 0; set nesterov to false"),
        (
            "layers.metrics",
            ["effective_rank"],
            "space.hints.metrics has 'r2_cca', which layers.metrics does not measure; add it there (effective_rank)",
        ),
        (
            "objective.metric",
            "val_loss",
            "objective.direction is 'maximize', but val_loss is to minimize; set objective.direction to minimize",
        ),
        (
            "objective.direction",
            "minimize",
            "objective.direction is 'minimize', but val_accuracy is to maximize; set objective.direction to maximize",
        ),
    ],
)
def test_mistake_is_one_line_that_names_key_value_and_mend(key: str, value: Any, message: str) -> None:
    assert refusal(key, value).startswith(message)


@pytest.mark.parametrize("key", TINY)
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_study({other: value for other, value in TINY.items() if other != key}, "tiny")
    assert str(caught.value) == f"tiny: the key {key!r} is missing; add it"


def test_value_that_json_cannot_say_is_shown_all_the_same() -> None:
    holds_itself: list[Any] = []
    holds_itself.append(holds_itself)
    assert refusal("seed", holds_itself) == "seed is [[...]], but input should be a valid integer; change seed"


def test_digits_loads() -> None:
    study = load_study("digits")
    assert (study.name, study.teacher.model, study.student.model) == ("digits", "resnet20", "resnet8")
    assert (study.control_trials, study.budget.trials) == (7, 20)


@pytest.mark.parametrize("load", [lambda: load_study("digits"), tiny, lambda: tiny("space.lr", {"low": 1, "high": 2})])
def test_resolved_study_is_the_same_study(load: Callable[[], Study]) -> None:
    study = load()
    assert validate_study(study.resolved(), "resolved") == study


def test_number_is_a_range_of_its_own() -> None:
    span = tiny("space.weight.classification", 2).space.weight.classification
    assert (span.low, span.high, span.default, span.searched) == (2, 2, 2, False)


def test_default_of_a_range_is_its_geometric_mean() -> None:
    assert tiny("space.weight.hint", {"low": 0.01, "high": 100}).space.weight.hint.default == pytest.approx(1)


def test_term_may_be_fixed_at_zero() -> None:
    assert not tiny("space.weight.logit", 0).space.weight.logit.searched


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("storage.path", "there/results", lambda study: study.storage.path),
        ("data.root", "there/images", lambda study: study.data.root),
        ("teacher", {"model": "resnet20", "checkpoint": "there/teacher.pt"}, lambda study: study.teacher.checkpoint),
    ],
)
def test_relative_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, read: Callable[[Study], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(read(tiny(key, value)))
    assert path.is_relative_to(tmp_path / "there")


def test_results_lie_in_the_present_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tiny().storage.path == str(tmp_path / "results")


def test_home_in_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny("storage.path", "~/results").storage.path == str(tmp_path / "results")


def test_file_of_one_s_own_factory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").touch()
    assert tiny("teacher.model", "my.py:net").teacher.model == f"{tmp_path}/my.py:net"


def test_folder_of_data_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for split in ("train", "test"):
        np.savez(f"mine/{split}.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, int))
    assert tiny("data.name", "mine").data.name == str(tmp_path / "mine")


def test_name_of_a_data_set_stays_as_it_is() -> None:
    assert tiny("data.name", "cifar100").data.name == "cifar100"


@pytest.mark.parametrize(
    ("controls", "trials"), [({"trials": 9}, 9), ({}, 20), ({"arms": []}, 0), ({"arms": [], "trials": 9}, 0)]
)
def test_controls_have_a_budget_of_their_own_or_that_of_the_search(controls: dict[str, Any], trials: int) -> None:
    assert tiny("controls", controls).control_trials == trials


def test_recipe_takes_another_learning_rate() -> None:
    study = tiny("recipe.lr", 0.2)
    assert (study.recipe.recipe().lr, study.recipe.recipe(0.5).lr) == (0.2, 0.5)


def test_preset_gives_the_keys_that_the_study_does_not() -> None:
    study = tiny("recipe", {"preset": "cifar_240", "batch_size": 128})
    recipe = study.recipe.recipe()
    assert (recipe.schedule, recipe.nesterov, recipe.lr, recipe.batch_size) == ("step", False, 0.05, 128)
    assert study.budget.rungs == (240,)


def test_preset_knows_the_networks_that_learn_slowly() -> None:
    study = validate_study({**TINY, "student": {"model": "ShuffleV1"}, "recipe": {"preset": "cifar_240"}}, "tiny")
    assert study.recipe.lr == 0.01


def test_rungs_of_the_study_win_over_those_of_a_preset() -> None:
    study = validate_study({**TINY, "recipe": {"preset": "cifar_240"}, "budget": {"rungs": [10, 20]}}, "tiny")
    assert study.budget.rungs == (10, 20)


def test_teacher_has_a_preset_of_its_own() -> None:
    study = tiny("teacher", {"model": "resnet20", "recipe": {"preset": "cifar_240"}})
    assert (study.teacher.recipe.epochs, study.teacher.recipe.schedule) == (240, "step")
    assert study.recipe.schedule == "cosine"


def test_study_with_a_preset_is_the_same_when_it_is_read_again() -> None:
    study = tiny("recipe", {"preset": "cifar_240"})
    assert validate_study(study.resolved(), "again") == study


def test_unknown_preset_is_refused_with_the_nearest() -> None:
    assert refusal("recipe.preset", "cifar_24").startswith(
        "recipe.preset: unknown recipe preset 'cifar_24'; did you mean 'cifar_240'?"
    )


def test_pretrained_is_no_path() -> None:
    teacher = {"model": "torchvision:resnet18", "checkpoint": "pretrained"}
    assert tiny("teacher", teacher).teacher.checkpoint == "pretrained"


def test_own_code_of_a_study_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "my.py").touch()
    named = {"student.model": "my.py:net", "data.name": "my.py:load"}
    for key, name in named.items():
        assert tiny(key, f"{tmp_path}/{name}").own_code() == {key.split(".")[0]: f"{tmp_path}/{name}"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "recipe.milestones",
            [150, 180],
            "recipe.milestones: 150 is no share of a rung; write each as a number between",
        ),
        ("recipe.milestones", [0.9, 0.3], "recipe.milestones: milestones are [0.9, 0.3], but must be increasing; sort"),
        ("resources.compile", True, "resources.compile: true is no compile mode; choose one of off, default, reduce-"),
        ("resources.compile", "max", "resources.compile: unknown compile mode 'max'; "),
        ("data.size", 0, "data.size is 0, but input should be greater than or equal to 1; change data.size"),
    ],
)
def test_mistake_in_training_or_data_is_one_clear_line(key: str, value: Any, message: str) -> None:
    assert refusal(key, value).startswith(message)


def test_bare_off_of_yaml_is_the_compile_mode() -> None:
    assert tiny("resources.compile", False).resources.compile == "off"


def test_study_cannot_be_changed() -> None:
    study = tiny()
    with pytest.raises(ValueError, match="frozen"):
        study.seed = 3  # type: ignore[misc]


def test_data_are_split_by_the_study_s_seed() -> None:
    assert tiny("seed", 5).data_spec().seed == 5


@pytest.mark.parametrize("weight", [0, {"low": 0.5, "high": 2, "optional": True}])
def test_classifier_that_may_stay_untrained_is_refused(weight: object) -> None:
    content = load_study("digits").resolved()
    content["space"]["weight"]["classification"] = weight
    with pytest.raises(
        InputError, match=r"needs a trained classifier; set it to 1, or the objective to val_map_cosine$"
    ):
        validate_study(content, "digits")
