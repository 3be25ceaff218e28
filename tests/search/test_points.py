"""Configurations of earlier searches: whether they fit, and when they are tried."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.events import Began, Enqueued, Finished, Reported
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.points import choices_of
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.searcher import JournalSearcher
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver

POINT: dict[str, Any] = {
    "hints.clusters": 2,
    "hints.metrics": "r2_cca,class_separation",
    "hints.selector": "kmedoids",
    "hints.pairing": "by_depth",
    "loss.hint": "at",
    "weight.hint": 0.5,
    "weight.logit": 2.0,
    "loss.logit": "kd",
    "temperature": 3.0,
    "weight.classification": 1.0,
    "lr": 0.1,
}
OTHER = {**POINT, "hints.metrics": "cka_linear", "weight.logit": 0.0, "loss.logit": None, "temperature": None}


def test_choices_are_what_optuna_calls_them(digits: Study) -> None:
    assert choices_of(POINT, digits) == {
        "hints.clusters": 2,
        "hints.metrics.r2_cca": True,
        "hints.metrics.cka_linear": False,
        "hints.metrics.effective_rank": False,
        "hints.metrics.class_separation": True,
        "hints.selector": "kmedoids",
        "loss.hint": "at",
        "weight.hint": 0.5,
        "weight.logit.on": True,
        "weight.logit": 2.0,
        "temperature": 3.0,
    }


def test_what_optuna_suggests_is_a_point_of_the_space(digits: Study) -> None:
    sampler = ArmSampler(digits, "any", 3)
    for number in range(1, 12):
        parameters, distributions = sampler.suggest(number, "")
        assert set(choices_of(parameters, digits)) == set(distributions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight.hint": 1000.0}, "weight.hint is 1000, but the space has 0.01..100"),
        ({"hints.clusters": 9}, "hints.clusters is 9, but the space has 1..5"),
        ({"loss.hint": "vid"}, "loss.hint is vid, but the space has fitnet, at, sp"),
        ({"hints.selector": "spectral"}, "hints.selector is spectral, but the space has paper_kmeans, kmedoids"),
        ({"hints.metrics": "pwcca"}, "hints.metrics has pwcca, but the space has r2_cca, cka_linear, effective_rank"),
        ({"lr": 0.05}, "lr is 0.05, but the space has 0.1 alone"),
        ({"weight.embedding": 0.3}, "weight.embedding is 0.3, but the space has None alone"),
        ({"loss.logit": "dkd"}, "loss.logit is dkd, but the space has kd alone"),
    ],
)
def test_trap_31_point_outside_of_the_space_is_refused(digits: Study, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        choices_of({**POINT, **changes}, digits)
    assert str(caught.value).startswith(message)


@pytest.fixture
def study(studied: Callable[..., Study]) -> Study:
    return studied("controls={arms: [kd_only], trials: 1}", "budget.trials=4", "confirm.seeds=0")


def started(log: SearchLog, study: Study, resolver: HintResolver) -> JournalSearcher:
    sampler = ArmSampler(study, "a search", 3)
    log.listen(sampler, from_start=True)
    return JournalSearcher(log, sampler, resolver, study, FailureBudget(5))


def taken(parameters: dict[str, Any]) -> dict[str, Any]:
    """What a point has of a trial's parameters."""
    return {name: value for name, value in parameters.items() if name in POINT}


def test_the_first_search_trials_take_the_points_in_order(log: SearchLog, study: Study, resolver: HintResolver) -> None:
    log.record(Enqueued([POINT, OTHER]))
    searcher = started(log, study, resolver)
    for name in "abcd":
        searcher.suggest(name)
    trials = log.history.trials
    assert trials[1].suggested.control == "kd_only"
    assert taken(trials[2].suggested.parameters) == POINT
    assert taken(trials[3].suggested.parameters) == {name: value for name, value in OTHER.items() if value is not None}
    assert trials[4].suggested.parameters != trials[2].suggested.parameters


def test_trap_8_points_are_tried_once_whatever_interrupts_the_search(
    log: SearchLog, study: Study, resolver: HintResolver
) -> None:
    log.record(Began("a search", study.resolved(), "0", "sqlite:///any.db"))
    log.record(Enqueued([POINT]))
    searcher = started(log, study, resolver)
    for name in "ab":
        number = searcher.suggest(name)["number"]
        log.record(Reported(number, 24, {"val_accuracy": 0.5}, None))
        log.record(Finished(number, "completed", ""))
    copy = log.path.with_name("copy.jsonl")
    shutil.copy(log.path, copy)
    resumed = SearchLog(copy)
    resumed.replay(read_journal(copy).events, torn=0)
    assert resumed.history.points == []
    again = started(resumed, study, resolver)
    # The very suggestion of a search that was not interrupted.
    assert again.suggest("a") == searcher.suggest("c")
    assert taken(resumed.history.trials[3].suggested.parameters) != POINT


def test_a_point_keeps_its_number_of_clusters_where_the_clustering_chooses(
    log: SearchLog, studied: Callable[..., Study], resolver: HintResolver
) -> None:
    study = studied("controls.trials=0", "budget.trials=1", "confirm.seeds=0", "space.hints.clusters=auto")
    log.record(Enqueued([{**POINT, "hints.clusters": 4}]))
    started(log, study, resolver).suggest("a")
    assert len(log.history.trials[1].suggested.selection["points"]) == 4
