"""Which trials a search has, and what is confirmed."""

from collections.abc import Callable, Sequence

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.events import Confirming, Extended, Finished, History, Reported, Suggested
from hintsearch.search.journal import SearchLog
from hintsearch.search.plan import (
    Plan,
    PlannedTrial,
    Repeat,
    confirm_seeds,
    confirmed_trials,
    most_repeats,
    plan_trials,
    remaining_trials,
)
from hintsearch.search.study import Study
from hintsearch.search.study_types import CONTROL_ARMS

PLAN = [PlannedTrial(1, "control", "kd_only"), PlannedTrial(2, "control", "random"), PlannedTrial(3, "search")]


def test_plan_of_digits_is_each_control_then_the_search(digits: Study) -> None:
    plan = plan_trials(digits)
    assert [(trial.arm, trial.control) for trial in plan[:7]] == [("control", arm) for arm in CONTROL_ARMS]
    assert [(trial.arm, trial.control) for trial in plan[7:]] == [("search", "")] * 20
    assert [trial.number for trial in plan] == list(range(1, 28))


def test_uneven_control_budget_is_dealt_out_evenly(studied: Callable[..., Study]) -> None:
    plan = plan_trials(studied("controls={arms: [kd_only, random, last], trials: 5}", "budget.trials=1"))
    assert [trial.control for trial in plan] == ["kd_only", "random", "last", "kd_only", "random", ""]


def test_fewer_control_trials_than_arms_leave_the_last_arms_out(studied: Callable[..., Study]) -> None:
    plan = plan_trials(studied("controls={arms: [kd_only, random, last], trials: 2}", "budget.trials=1"))
    assert [trial.control for trial in plan] == ["kd_only", "random", ""]


def test_search_without_controls_starts_at_1(studied: Callable[..., Study]) -> None:
    assert plan_trials(studied("controls.arms=[]", "budget.trials=1")) == [PlannedTrial(1, "search")]


def test_extension_adds_search_trials_after_the_others(digits: Study) -> None:
    plan = plan_trials(digits, [Extended(2)])
    assert plan[:27] == plan_trials(digits)
    assert plan[27:] == [PlannedTrial(28, "search"), PlannedTrial(29, "search")]


def test_remaining_trials_are_those_without_an_outcome(
    log: SearchLog, suggested: Callable[..., Suggested], record_all: Callable[..., None]
) -> None:
    record_all(log, suggested(1, "kd_only"), suggested(2, "random"), Finished(1, "completed", ""))
    assert remaining_trials(PLAN, log.history) == PLAN[1:]


@pytest.fixture(scope="module")
def confirming(studied: Callable[..., Study]) -> Study:
    """Three trials of two control arms, three of the search; the best two of each are confirmed with three seeds."""
    controls = "controls={arms: [kd_only, random], trials: 3}"
    return studied(controls, "budget.trials=3", "confirm={configurations: 2, controls: 2, seeds: 3}")


@pytest.fixture
def ended(suggested: Callable[..., Suggested]) -> Callable[..., History]:
    """A history in which trials 1, 2, .. of these arms completed with these accuracies; None: the trial failed."""

    def make(trials: Sequence[tuple[str, float | None]], metric: str = "val_accuracy") -> History:
        history = History()
        for number, (control, value) in enumerate(trials, start=1):
            history.apply(suggested(number, control))
            if value is not None:
                history.apply(Reported(number, 24, {metric: value}, None))
            history.apply(Finished(number, "failed" if value is None else "completed", ""))
        return history

    return make


CONTROLS = [("kd_only", 0.5), ("random", 0.6), ("kd_only", 0.7)]


def test_the_best_of_the_search_and_of_the_control_arms_are_confirmed(
    confirming: Study, ended: Callable[..., History]
) -> None:
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9), ("", 0.8)])
    # Of the arm kd_only its best trial alone.
    assert confirmed_trials(confirming, history) == [5, 6, 3, 2]


def test_the_smallest_are_confirmed_where_the_objective_is_minimised(
    studied: Callable[..., Study], ended: Callable[..., History]
) -> None:
    study = studied("objective={metric: val_loss, direction: minimize}", "confirm.configurations=1")
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9)], metric="val_loss")
    assert confirmed_trials(study, history) == [4, 1, 2]


def test_nothing_is_confirmed_where_no_search_trial_completed(confirming: Study, ended: Callable[..., History]) -> None:
    assert confirmed_trials(confirming, ended([*CONTROLS, ("", None), ("", None), ("", None)])) == []


def test_seeds_are_fresh_and_distinct(confirming: Study) -> None:
    seeds = [seed for pair in confirm_seeds(confirming) for seed in pair]
    assert len(set(seeds)) == 6
    assert confirming.seed not in seeds


def test_another_study_seed_has_other_seeds(confirming: Study, studied: Callable[..., Study]) -> None:
    assert not set(confirm_seeds(confirming)) & set(confirm_seeds(studied("seed=1")))


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_are_refused(studied: Callable[..., Study], seeds: int) -> None:
    with pytest.raises(InputError) as caught:
        studied(f"confirm.seeds={seeds}")
    assert str(caught.value).endswith(
        f"confirm: seeds is {seeds}, but a difference has no meaning below 3 seeds; set it to 3 or more, or to 0 to "
        "confirm nothing"
    )


def test_repeats_of_the_controls_are_due_while_search_trials_run(
    confirming: Study, ended: Callable[..., History], suggested: Callable[..., Suggested]
) -> None:
    assert Plan(confirming, ended(CONTROLS)).repeats_due() == []
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9)])
    history.apply(suggested(6, ""))
    plan = Plan(confirming, history)
    # Seed by seed: what there is after an interruption is of pairs.
    assert plan.repeats_due() == [Repeat(source, *pair) for pair in confirm_seeds(confirming) for source in (3, 2)]
    history.apply(plan.confirming())
    assert plan.repeats_due() == []
    history.apply(Reported(6, 24, {"val_accuracy": 0.8}, None))
    history.apply(Finished(6, "completed", ""))
    assert plan.repeats_due() == [Repeat(source, *pair) for pair in confirm_seeds(confirming) for source in (5, 6)]


def test_nothing_is_due_while_a_control_runs(confirming: Study, ended: Callable[..., History]) -> None:
    history = ended([*CONTROLS[:2], ("", 0.4), ("", 0.4), ("", 0.9), ("", 0.8)])
    trials = dict(history.trials)
    # As if the third control were a slow one.
    history.trials = {number: trial for number, trial in trials.items() if number != 3}
    assert Plan(confirming, history).repeats_due() == []


def test_all_repeats_are_due_when_search_and_controls_are_over(
    confirming: Study, ended: Callable[..., History]
) -> None:
    due = Plan(confirming, ended([*CONTROLS, ("", 0.4), ("", 0.9), ("", 0.8)])).repeats_due()
    assert due == [Repeat(source, *pair) for pair in confirm_seeds(confirming) for source in (5, 6, 3, 2)]


def test_repeats_that_are_planned_are_not_due_again(confirming: Study, ended: Callable[..., History]) -> None:
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9), ("", 0.8)])
    plan = Plan(confirming, history)
    history.apply(plan.confirming())
    assert plan.repeats_due() == []
    assert [planned.number for planned in plan.remaining] == list(range(7, 19))
    assert not plan.over


def test_no_repeat_is_due_where_nothing_is_confirmed(
    studied: Callable[..., Study], ended: Callable[..., History]
) -> None:
    study = studied("controls={arms: [kd_only], trials: 1}", "budget.trials=1", "confirm.seeds=0")
    assert Plan(study, ended([("kd_only", 0.5), ("", 0.6)])).over


def test_an_extended_search_confirms_what_is_missing(confirming: Study, ended: Callable[..., History]) -> None:
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9), ("", 0.8)])
    plan = Plan(confirming, history)
    history.apply(plan.confirming())
    history.apply(Extended(1))
    assert plan.trials[-1] == PlannedTrial(19, "search")
    later = ended([*CONTROLS, ("", 0.4), ("", 0.9), ("", 0.8), *[("kd_only", 0.5)] * 12, ("", 1.0)])
    later.additions = history.additions
    # Trial 19 is the best now; 5 and the controls have been confirmed.
    assert {repeat.confirms for repeat in Plan(confirming, later).repeats_due()} == {19}


def test_numbers_go_on_after_the_repeats(confirming: Study) -> None:
    seeds = confirm_seeds(confirming)[0]
    repeat = {"confirms": 5, "data_seed": seeds[0], "init_seed": seeds[1]}
    plan = plan_trials(confirming, [Confirming([repeat]), Extended(1)])
    assert plan[6:] == [PlannedTrial(7, "confirm", "", Repeat(5, *seeds)), PlannedTrial(8, "search")]


def test_the_most_there_will_be_counts_what_is_yet_to_be_confirmed(
    confirming: Study, ended: Callable[..., History]
) -> None:
    history = ended([])
    plan = Plan(confirming, history)
    assert most_repeats(confirming) == 12
    assert plan.most == 18
    history = ended([*CONTROLS, ("", 0.4), ("", 0.9)])
    plan = Plan(confirming, history)
    history.apply(plan.confirming())
    # The six repeats of the controls are among them.
    assert plan.most == 18
    history = ended([*CONTROLS, ("", 0.4), ("", None), ("", None)])
    plan = Plan(confirming, history)
    history.apply(plan.confirming())
    # One configuration alone is left to confirm.
    assert plan.most == 6 + 9
