"""Suggestions for combinations of losses, ranges of single losses, the penultimate features, and rankings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hintsearch.search.events import Finished, Reported, Suggested, event_from_dict, event_to_dict
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.suggestions import hint_weights
from optuna.trial import TrialState

Studied = Callable[..., Study]
Suggest = Callable[..., Suggested]
NAME = "losses-20260101-120000"
WEIGHT = "space.weight"
RANKINGS = "objective.metric=val_map_cosine"
OPTIONAL = "{low: 0.1, high: 1, default: 0.4, optional: true}"


@pytest.fixture(scope="module")
def combined(studied: Studied) -> Study:
    """Losses alone and together, one of them with a range of its own, and taught penultimate features."""
    return studied(
        "space.loss.hint=[at+crd, crd, sp+fitnet+at]",
        f"{WEIGHT}.by_loss={{crd: {{low: 1000, high: 2000, default: 1500}}}}",
        f"{WEIGHT}.embedding={OPTIONAL}",
        "space.loss.embedding=[pkt_symmetric, cosine]",
        "budget.startup_trials=4",
    )


@pytest.fixture(scope="module")
def many(combined: Study) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """100 random suggestions with their distributions."""
    sampler = ArmSampler(combined.model_copy(update={"seed": 1}), NAME, 3)
    return [sampler.suggest(number, "") for number in range(1, 101)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ("at", (("weight.hint", "at"),)),
        ("at+crd", (("weight.hint", "at"), ("weight.hint.2", "crd"))),
        ("a.py:x+sp+at", (("weight.hint", "a.py:x"), ("weight.hint.2", "sp"), ("weight.hint.3", "at"))),
    ],
)
def test_each_loss_of_a_combination_has_a_weight_of_its_own(losses: str, expected: tuple[tuple[str, str], ...]) -> None:
    assert hint_weights(losses) == expected


def test_suggestion_has_a_weight_for_each_loss_and_no_other(many: list[tuple[dict[str, Any], dict[str, str]]]) -> None:
    assert {parameters["loss.hint"] for parameters, _ in many} == {"at+crd", "crd", "sp+fitnet+at"}
    for parameters, _ in many:
        weights = {name for name in parameters if name.startswith("weight.hint")}
        assert weights == {name for name, _ in hint_weights(parameters["loss.hint"])}


def test_loss_with_a_range_of_its_own_is_drawn_from_it(many: list[tuple[dict[str, Any], dict[str, str]]]) -> None:
    for parameters, _ in many:
        for name, loss in hint_weights(parameters["loss.hint"]):
            low, high = (1000, 2000) if loss == "crd" else (0.01, 100)
            assert low <= parameters[name] <= high


def test_distributions_of_common_and_own_ranges_are_kept_apart(
    many: list[tuple[dict[str, Any], dict[str, str]]],
) -> None:
    """Optuna takes one distribution for a name."""
    own = {"at+crd": {"weight.hint", "weight.hint.2@crd"}, "crd": {"weight.hint@crd"}}
    own["sp+fitnet+at"] = {"weight.hint", "weight.hint.2", "weight.hint.3"}
    ranges: dict[str, set[str]] = {}
    for parameters, distributions in many:
        chosen = {name: said for name, said in distributions.items() if name.startswith("weight.hint")}
        assert set(chosen) == own[parameters["loss.hint"]]
        for name, said in chosen.items():
            ranges.setdefault(name, set()).add(said)
    assert {name: len(said) for name, said in ranges.items()} == dict.fromkeys(set.union(*own.values()), 1)


def test_fixed_weight_of_a_loss_is_no_question_to_optuna(studied: Studied) -> None:
    study = studied("space.loss.hint=at+crd", f"{WEIGHT}.by_loss={{at: 1000, crd: 0.8}}")
    parameters, distributions = ArmSampler(study, NAME, 3).suggest(1, "")
    assert (parameters["weight.hint"], parameters["weight.hint.2"]) == (1000, 0.8)
    assert not [name for name in distributions if name.startswith("weight.hint")]


def test_one_loss_of_a_combination_may_be_left_out_alone(studied: Studied) -> None:
    study = studied("space.loss.hint=at+sp", f"{WEIGHT}.by_loss={{sp: {OPTIONAL}}}", "budget.startup_trials=100")
    sampler = ArmSampler(study, NAME, 3)
    found = [sampler.suggest(number, "")[0] for number in range(1, 31)]
    assert {parameters["weight.hint.2"] > 0 for parameters in found} == {True, False}
    assert all(parameters["weight.hint"] > 0 for parameters in found)


def test_penultimate_features_have_a_loss_where_they_have_a_weight(
    many: list[tuple[dict[str, Any], dict[str, str]]],
) -> None:
    on = [parameters for parameters, _ in many if parameters["weight.embedding"] > 0]
    assert 20 < len(on) < 80
    assert all(0.1 <= parameters["weight.embedding"] <= 1 for parameters in on)
    assert {parameters["loss.embedding"] for parameters in on} == {"pkt_symmetric", "cosine"}
    assert all("loss.embedding" not in parameters for parameters, _ in many if parameters not in on)


def test_penultimate_features_are_left_alone_by_default(studied: Studied) -> None:
    parameters, _ = ArmSampler(studied(), NAME, 3).suggest(1, "")
    assert not {"weight.embedding", "loss.embedding"} & set(parameters)


def test_first_trial_of_a_control_has_the_defaults_of_every_loss(combined: Study) -> None:
    parameters, _ = ArmSampler(combined, NAME, 3).suggest(1, "stage_ends")
    assert parameters == {
        "hints.clusters": 3,
        "hints.metrics": "",
        "hints.selector": "stage_ends",
        "loss.hint": "at+crd",
        "weight.hint": 1.0,
        "weight.hint.2": 1500,
        "weight.logit": 1.0,
        "loss.logit": "kd",
        "temperature": 4.0,
        "weight.embedding": 0.4,
        "loss.embedding": "pkt_symmetric",
        "weight.classification": 1.0,
        "lr": combined.recipe.lr,
    }


def test_first_trial_of_a_control_has_the_raw_weights_of_a_preset(studied: Studied) -> None:
    parameters, _ = ArmSampler(studied("space.preset=wsl+at"), NAME, 3).suggest(1, "last")
    weights = {name: parameters[name] for name in ("weight.hint", "weight.logit", "weight.classification")}
    assert weights == {"weight.hint": 1000, "weight.logit": 1, "weight.classification": 1}
    assert (parameters["loss.hint"], parameters["loss.logit"], parameters["temperature"]) == ("at", "wsl", 4)


def controls(study: Study, control: str, trials: int = 30) -> list[dict[str, Any]]:
    """Parameters of a control's first trials: defaults, then random ones."""
    sampler = ArmSampler(study, NAME, 3)
    return [sampler.suggest(number, control)[0] for number in range(1, trials + 1)]


@pytest.mark.parametrize(
    ("logit", "embedding", "logit_off", "embedding_off"),
    [
        (OPTIONAL, "0", False, True),
        # Penultimate features that are always taught are distillation enough.
        (OPTIONAL, "0.5", True, False),
        # Where both may be off, one of them stays.
        (OPTIONAL, OPTIONAL, False, True),
        ("1", OPTIONAL, False, True),
        ("0", "0.5", True, False),
    ],
)
def test_kd_only_always_distils(
    studied: Studied, logit: str, embedding: str, logit_off: bool, embedding_off: bool
) -> None:
    study = studied(f"{WEIGHT}.logit={logit}", f"{WEIGHT}.embedding={embedding}", "budget.startup_trials=100")
    found = [(p["weight.logit"] == 0, p.get("weight.embedding", 0) == 0) for p in controls(study, "kd_only")]
    assert (True, True) not in found
    assert any(off for off, _ in found) is logit_off
    assert any(off for _, off in found) is embedding_off


@pytest.mark.parametrize("embedding", ["0", OPTIONAL])
def test_kd_only_of_a_study_without_logit_loss_learns_labels_where_it_is_taught_nothing(
    studied: Studied, embedding: str
) -> None:
    """Nothing else is left, and a network that learns nothing would be no baseline."""
    study = studied(RANKINGS, f"{WEIGHT}.classification=0", f"{WEIGHT}.logit=0", f"{WEIGHT}.embedding={embedding}")
    for parameters in controls(study, "kd_only"):
        taught = parameters.get("weight.embedding", 0) > 0
        assert parameters["weight.classification"] == (0 if taught else 1)


def test_kd_only_learns_no_labels_where_the_study_has_none(studied: Studied) -> None:
    study = studied(RANKINGS, f"{WEIGHT}.classification=0", f"{WEIGHT}.logit=1")
    assert {parameters["weight.classification"] for parameters in controls(study, "kd_only")} == {0}


@pytest.mark.parametrize("classification", ["0", OPTIONAL])
def test_no_distillation_learns_labels_also_where_the_study_has_none(studied: Studied, classification: str) -> None:
    study = studied(RANKINGS, f"{WEIGHT}.classification={classification}", f"{WEIGHT}.embedding=0.5")
    for parameters in controls(study, "no_distillation"):
        assert parameters == {
            "weight.hint": 0,
            "weight.logit": 0,
            "weight.classification": 1,
            "lr": study.recipe.lr,
        }


def course(number: int) -> list[Any]:
    """How a trial goes on after its suggestion."""
    accuracy = 0.3 + 0.6 * (number * 37 % 11) / 11
    reports = [Reported(number, epoch, {"val_accuracy": accuracy}, None) for epoch in (8, 24)]
    ends = [
        [reports[0], Finished(number, "pruned", "")],
        [*reports, Finished(number, "completed", "")],
        [Finished(number, "failed", "it broke")],
    ]
    return ends[number % 3]


def test_replayed_sampler_gives_the_very_suggestions(combined: Study, suggest: Suggest) -> None:
    undisturbed, events = ArmSampler(combined, NAME, 3), []
    arms = {1: "kd_only", 2: "stage_ends", 3: "no_distillation", 4: "kd_only", 5: "stage_ends"}
    for number in range(1, 21):
        found = [suggest(undisturbed, number, arms.get(number, "")), *course(number)]
        for event in found:
            undisturbed.on_event(event)
        events += found
    # All that a name has to survive came about.
    asked = {name for event in events if isinstance(event, Suggested) for name in event.distributions}
    assert {"weight.hint@crd", "weight.hint.2@crd", "weight.hint.3", "weight.embedding.on", "loss.embedding"} <= asked
    replayed = ArmSampler(combined, NAME, 3)
    for event in events:
        replayed.on_event(event_from_dict(json.loads(json.dumps(event_to_dict(event)))))
    for number, control in ((21, ""), (22, "kd_only"), (23, "stage_ends"), (24, "")):
        ours, theirs = (suggest(sampler, number, control) for sampler in (replayed, undisturbed))
        assert ours == theirs
        for event in (ours, *course(number)):
            replayed.on_event(event)
            undisturbed.on_event(event)


def test_switches_of_single_losses_are_replayed(studied: Studied, suggest: Suggest) -> None:
    overrides = "space.loss.hint=at+sp", f"{WEIGHT}.by_loss={{sp: {OPTIONAL}}}", "budget.startup_trials=2"
    undisturbed, replayed = (ArmSampler(studied(*overrides), NAME, 3) for _ in range(2))
    off = set()
    for number in range(1, 12):
        suggested = suggest(undisturbed, number)
        off.add(suggested.parameters["weight.hint.2"] == 0)
        for event in (suggested, *course(number)):
            undisturbed.on_event(event)
            replayed.on_event(event)
    assert off == {True, False}
    assert suggest(replayed, 12) == suggest(undisturbed, 12)


def test_epochs_without_rankings_are_not_told(studied: Studied, suggest: Suggest, tmp_path: Path) -> None:
    """Rankings are measured at the ends of rungs; the epochs between have a value of nothing."""
    sampler = ArmSampler(studied(RANKINGS), NAME, 3)
    ranked = {8: 0.4, 24: 0.6}
    for number, outcome in ((1, "completed"), (2, "pruned"), (3, "failed")):
        sampler.on_event(suggest(sampler, number))
        for epoch in {"completed": (1, 7, 8, 9, 24), "pruned": (1, 8), "failed": (1,)}[outcome]:
            metrics = {"val_accuracy": 0.9} | ({"val_map_cosine": ranked[epoch]} if epoch in ranked else {})
            sampler.on_event(Reported(number, epoch, metrics, None))
        sampler.on_event(Finished(number, outcome, ""))  # type: ignore[arg-type]
    sampler.save(tmp_path / "optuna.db")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    trials = optuna.load_study(study_name=NAME, storage=storage).trials
    assert [(trial.state, trial.intermediate_values) for trial in trials] == [
        (TrialState.COMPLETE, ranked),
        (TrialState.PRUNED, {8: 0.4}),
        (TrialState.FAIL, {}),
    ]
    assert trials[0].value == 0.6
    storage.engine.dispose()
