"""What a search found beyond its trials: importances, and the files of a Pareto set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hintsearch.analysis.importance import Importances
from hintsearch.analysis.pareto import ParetoSet
from hintsearch.analysis.trials import SearchRecord
from hintsearch.search.events import Arm, Event, Finished, History, Reported, Suggested
from hintsearch.search.export import load_hints
from hintsearch.search.findings import export_pareto, search_importances
from hintsearch.search.preparation import Preparation
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.suggestions import chosen
from mlflow.tracking import MlflowClient
from recorded_search import recorded_search

TRIALS = 60
Parameters = dict[str, Any]


@pytest.fixture(scope="module")
def drawn(studied: Callable[..., Study]) -> list[tuple[Parameters, dict[str, str]]]:
    """Random suggestions of the search, with terms that are on and off and ranges of single losses."""
    study = studied(
        "budget.startup_trials=1000",
        "space.loss.hint=[at+sp, fitnet]",
        "space.weight.by_loss={sp: {low: 1, high: 2}}",
        "space.weight.embedding={low: 0.1, high: 1, optional: true}",
    )
    sampler = ArmSampler(study, "any", 3)
    return [sampler.suggest(number, "") for number in range(1, TRIALS + 1)]


def test_choices_are_read_back_from_the_parameters_that_they_led_to(
    drawn: list[tuple[Parameters, dict[str, str]]],
) -> None:
    for parameters, distributions in drawn:
        found = {name: chosen(name, parameters) for name in distributions}
        metrics = set(parameters["hints.metrics"].split(","))
        for name, value in found.items():
            if name.startswith("hints.metrics."):
                assert value is (name.removeprefix("hints.metrics.") in metrics)
            elif name.endswith(".on"):
                assert value is (parameters[name.removesuffix(".on")] > 0)
            else:
                assert value == parameters[name.partition("@")[0]]


def history_of(drawn: list[tuple[Parameters, dict[str, str]]], metric: str, arm: Arm = "search") -> History:
    """More clusters are better; with less than four a trial ends at the first rung, at the last one all are alike."""
    history = History()
    for number, (parameters, distributions) in enumerate(drawn, start=1):
        clusters = parameters["hints.clusters"]
        survives = clusters >= 4
        history.apply(Suggested(number, arm, "", parameters, distributions, {}, {}))
        # A little besides, so that no two are equal.
        value = clusters / 10 + 1e-4 * (number * 37 % TRIALS)
        history.apply(Reported(number, 8, {metric: value}, "continue" if survives else "stop"))
        if survives:
            history.apply(Reported(number, 24, {metric: 0.95}, None))
        history.apply(Finished(number, "completed" if survives else "pruned", ""))
    return history


@pytest.fixture(scope="module")
def found(digits: Study, drawn: list[tuple[Parameters, dict[str, str]]]) -> Importances:
    return search_importances(digits, history_of(drawn, "val_accuracy"))


def test_trap_34_pruned_trials_count_with_their_first_rung(found: Importances) -> None:
    assert found.trials == TRIALS
    # At the last rung nothing made a difference.
    assert found.parameters[0].name == "hints.clusters"
    assert found.parameters[0].share > 0.5
    assert found.parameters[0].by_chance < 0.05


@pytest.mark.parametrize(
    ("overrides", "metric", "sign"),
    [([], "val_accuracy", 1), (["objective={metric: val_loss, direction: minimize}"], "val_loss", -1)],
)
def test_trap_34_metric_that_raises_the_value_is_good_only_where_it_is_maximised(
    studied: Callable[..., Study],
    drawn: list[tuple[Parameters, dict[str, str]]],
    overrides: list[str],
    metric: str,
    sign: int,
) -> None:
    history = History()
    for number, (parameters, distributions) in enumerate(drawn, start=1):
        value = 0.9 if "r2_cca" in parameters["hints.metrics"].split(",") else 0.5
        history.apply(Suggested(number, "search", "", parameters, distributions, {}, {}))
        history.apply(Reported(number, 8, {metric: value}, None))
    effects = {m.name: m.effect for m in search_importances(studied(*overrides), history).metrics}
    assert effects["r2_cca"] == pytest.approx(sign * 0.4)


def test_trials_before_their_first_rung_are_left_out(
    digits: Study, drawn: list[tuple[Parameters, dict[str, str]]]
) -> None:
    history = history_of(drawn[:4], "val_accuracy")
    history.apply(Suggested(5, "search", "", *drawn[4], {}, {}))
    history.apply(Reported(5, 7, {"val_accuracy": 0.9}, None))
    history.apply(Finished(5, "failed", "it broke"))
    found = search_importances(digits, history)
    assert (found.trials, found.too_few) == (4, True)


@pytest.mark.parametrize("arm", ["control", "confirm"])
def test_trials_that_nobody_searched_are_left_out(
    digits: Study, drawn: list[tuple[Parameters, dict[str, str]]], arm: Arm
) -> None:
    assert search_importances(digits, history_of(drawn, "val_accuracy", arm)).trials == 0


# Accuracy and seconds; 3 has most of the gain for little of the time, 5 is beaten by 3.
WEIGHED = {2: (0.90, 40.0), 3: (0.88, 15.0), 4: (0.70, 10.0), 5: (0.87, 20.0)}


@pytest.fixture(scope="module")
def weighed(
    client: MlflowClient,
    studied: Callable[..., Study],
    preparation: Preparation,
    suggested: Callable[..., Suggested],
    tmp_path_factory: pytest.TempPathFactory,
) -> SearchRecord:
    """A finished search of accuracy against seconds of training."""
    events: list[Event] = []
    for number, (accuracy, seconds) in WEIGHED.items():
        metrics = {"val_accuracy": accuracy, "training_seconds": seconds}
        events += [suggested(number), Reported(number, 24, metrics, None), Finished(number, "completed", "")]
    study, folder = studied("objective.against=training_seconds"), tmp_path_factory.mktemp("weighed")
    return recorded_search(client, "weighed-20260101-120000", study, preparation, folder, events)


@pytest.fixture(scope="module")
def written(client: MlflowClient, weighed: SearchRecord, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of its Pareto set."""
    pareto = weighed.pareto()
    assert pareto == ParetoSet((2, 3, 4), 3)
    return export_pareto(client, weighed, pareto, tmp_path_factory.mktemp("files") / "pareto")


def test_every_member_of_the_pareto_set_is_exported(written: list[Path]) -> None:
    assert {path.name for path in written[0].parent.iterdir()} == {path.name for path in written}
    assert [load_hints(path).trial for path in written[:-1]] == [2, 3, 4]
    assert [load_hints(path).evidence.value for path in written[:-1]] == [0.90, 0.88, 0.70]


def test_list_of_the_pareto_set_has_both_objectives_and_marks_the_knee(written: list[Path]) -> None:
    assert json.loads(written[-1].read_text()) == {
        "directions": {"val_accuracy": "maximize", "training_seconds": "minimize"},
        "members": [
            {"trial": 2, "val_accuracy": 0.90, "training_seconds": 40.0, "knee": False, "file": "trial-2.yaml"},
            {"trial": 3, "val_accuracy": 0.88, "training_seconds": 15.0, "knee": True, "file": "trial-3.yaml"},
            {"trial": 4, "val_accuracy": 0.70, "training_seconds": 10.0, "knee": False, "file": "trial-4.yaml"},
        ],
    }
