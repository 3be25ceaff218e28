"""How a search hands out what it confirms."""

import json
from collections.abc import Callable

import pytest
from hintsearch.search.events import Confirming, Extended, Finished, Reported, Suggested
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.plan import confirm_seeds
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.searcher import JournalSearcher
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver
from ray.tune.search import Searcher

VALUES = {1: 0.5, 2: 0.6, 3: 0.7}


@pytest.fixture(scope="module")
def confirming(studied: Callable[..., Study]) -> Study:
    """Two controls and a search trial; the search's and the better control are confirmed with three seeds."""
    controls = "controls={arms: [kd_only, random], trials: 2}"
    return studied(controls, "budget.trials=1", "confirm={configurations: 1, controls: 1, seeds: 3}")


@pytest.fixture
def sampler(log: SearchLog, confirming: Study) -> ArmSampler:
    found = ArmSampler(confirming, "a search", 3)
    log.listen(found)
    return found


@pytest.fixture
def searcher(log: SearchLog, confirming: Study, resolver: HintResolver, sampler: ArmSampler) -> JournalSearcher:
    return JournalSearcher(log, sampler, resolver, confirming, FailureBudget(5))


def complete(log: SearchLog, number: int) -> None:
    log.record(Reported(number, 24, {"val_accuracy": VALUES.get(number, 0.5)}, None))
    log.record(Finished(number, "completed", ""))


@pytest.fixture
def searched(searcher: JournalSearcher, log: SearchLog) -> JournalSearcher:
    """All but the confirm trials are over."""
    for name in "abc":
        complete(log, searcher.suggest(name)["number"])
    return searcher


def repeats(log: SearchLog) -> list[Suggested]:
    return [trial.suggested for trial in log.history.trials.values() if trial.suggested.arm == "confirm"]


def test_nothing_is_confirmed_while_a_trial_runs_that_decides_what(searcher: JournalSearcher, log: SearchLog) -> None:
    for name in "abc":
        searcher.suggest(name)
    complete(log, 1)
    complete(log, 2)
    assert searcher.suggest("d") is None
    complete(log, 3)
    assert searcher.suggest("e")["number"] == 4


def test_controls_are_repeated_while_the_last_search_trials_run(
    log: SearchLog, sampler: ArmSampler, resolver: HintResolver, studied: Callable[..., Study]
) -> None:
    """An actor that stood idle would be let go of, and another one started."""
    controls = "controls={arms: [kd_only], trials: 1}"
    study = studied(controls, "budget.trials=2", "confirm={configurations: 1, controls: 1, seeds: 3}")
    searcher = JournalSearcher(log, sampler, resolver, study, FailureBudget(5))
    for name in "abc":
        number = searcher.suggest(name)["number"]
        if number < 3:
            complete(log, number)
    # Trial 3 may become the best of the search, but not of the controls.
    assert [searcher.suggest(name)["number"] for name in "def"] == [4, 5, 6]
    assert [suggested.confirms for suggested in repeats(log)] == [1, 1, 1]
    assert searcher.suggest("g") is None
    complete(log, 3)
    assert [searcher.suggest(name)["number"] for name in "hij"] == [7, 8, 9]
    assert [suggested.confirms for suggested in repeats(log)] == [1, 1, 1, 3, 3, 3]
    assert searcher.suggest("k") == Searcher.FINISHED


def test_what_is_confirmed_is_journaled_before_the_first_repeat(searched: JournalSearcher, log: SearchLog) -> None:
    searched.suggest("d")
    (addition,) = log.history.additions
    assert isinstance(addition, Confirming)
    assert [repeat["confirms"] for repeat in addition.repeats] == [3, 2] * 3


def test_repeats_have_fresh_seeds_the_same_for_all(
    searched: JournalSearcher, log: SearchLog, confirming: Study
) -> None:
    for name in "defghi":
        searched.suggest(name)
    for source in (3, 2):
        found = [(s.data_seed, s.init_seed) for s in repeats(log) if s.confirms == source]
        assert found == confirm_seeds(confirming)


def test_repeat_of_the_search_is_its_very_configuration(searched: JournalSearcher, log: SearchLog) -> None:
    searched.suggest("d")
    first, (repeat,) = log.history.trials[3].suggested, repeats(log)
    assert (repeat.parameters, repeat.hints, repeat.selection) == (first.parameters, first.hints, first.selection)


def test_random_control_has_new_layers_for_each_seed(searched: JournalSearcher, log: SearchLog) -> None:
    for name in "defghi":
        searched.suggest(name)
    random = [log.history.trials[2].suggested, *(s for s in repeats(log) if s.control == "random")]
    assert len({tuple(s.selection["points"]) for s in random}) > 1
    for suggested in random:
        assert [pair["teacher_layer"] for pair in suggested.hints["pairs"]] == list(suggested.selection["points"])


def test_search_is_finished_after_the_repeats(searched: JournalSearcher) -> None:
    for name in "defghi":
        searched.suggest(name)
    assert searched.suggest("j") == Searcher.FINISHED


def test_interrupted_confirm_goes_on_where_it_was(
    searched: JournalSearcher, log: SearchLog, sampler: ArmSampler, resolver: HintResolver, confirming: Study
) -> None:
    configs = [searched.suggest(name) for name in "de"]
    complete(log, 4)
    resumed = JournalSearcher(log, sampler, resolver, confirming, FailureBudget(5))
    assert resumed.suggest("a") == configs[1]
    assert resumed.suggest("b")["number"] == 6
    assert len(log.history.additions) == 1


def test_trap_31_optuna_does_not_hear_of_repeats(
    searched: JournalSearcher, log: SearchLog, sampler: ArmSampler, confirming: Study
) -> None:
    complete(log, searched.suggest("d")["number"])
    replayed = ArmSampler(confirming, "a search", 3)
    log.listen(replayed, from_start=True)
    for heard in (sampler, replayed):
        assert sum(len(study.trials) for study in heard._studies.values()) == 3


def test_repeat_that_still_runs_is_not_begun_again_when_more_is_confirmed(
    searched: JournalSearcher, log: SearchLog, sampler: ArmSampler, resolver: HintResolver, confirming: Study
) -> None:
    searched.suggest("d")
    log.record(Extended(1))
    resumed = JournalSearcher(log, sampler, resolver, confirming, FailureBudget(5))
    handed_out = [resumed.suggest(name)["number"] for name in "abcdefg"]
    # Of the first repeats one still runs; the added trial is the best by now.
    for number in handed_out[1:]:
        log.record(Reported(number, 24, {"val_accuracy": 0.9 if number == 10 else 0.5}, None))
        log.record(Finished(number, "completed", ""))
    assert handed_out == [4, 5, 6, 7, 8, 9, 10]
    assert [resumed.suggest(name)["number"] for name in "hij"] == [11, 12, 13]
    assert resumed.suggest("k") == Searcher.FINISHED


def test_nothing_is_confirmed_when_the_search_is_given_up(
    log: SearchLog, sampler: ArmSampler, resolver: HintResolver, confirming: Study
) -> None:
    failures = FailureBudget(1)
    log.listen(failures)
    searcher = JournalSearcher(log, sampler, resolver, confirming, failures)
    for name in "abc":
        number = searcher.suggest(name)["number"]
        if number < 3:
            complete(log, number)
    log.record(Reported(3, 8, {"val_accuracy": 0.5}, None))
    log.record(Finished(3, "failed", "it broke"))
    assert searcher.suggest("d") == Searcher.FINISHED
    assert log.history.additions == []


def test_interrupted_confirm_has_the_same_plan_after_a_replay(
    searched: JournalSearcher, log: SearchLog, resolver: HintResolver, confirming: Study
) -> None:
    configs = [searched.suggest(name) for name in "defghi"]
    resumed = SearchLog(log.path)
    resumed.replay(read_journal(log.path).events, torn=0)
    again = JournalSearcher(resumed, ArmSampler(confirming, "a search", 3), resolver, confirming, FailureBudget(5))
    journal = log.path.read_bytes()
    found = [again.suggest(name) for name in "abcdef"]
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(configs))
    assert again.suggest("g") == Searcher.FINISHED
    assert log.path.read_bytes() == journal
