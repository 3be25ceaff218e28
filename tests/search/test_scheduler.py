import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hintsearch.search.epoch_reports import EPOCHS, NO_ROOM, NOT_SHARED
from hintsearch.search.events import Finished, History, Reported, Suggested
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.scheduler import RungScheduler, rung_decision
from hintsearch.search.study import Study
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

Reached = Callable[..., History]


@pytest.fixture
def reached(suggested: Callable[..., Suggested]) -> Reached:
    """A history in which search trials 1, 2, .. (and then controls) have reached epoch 8 with these accuracies."""

    def make(values: Sequence[float], controls: Sequence[float] = (), metric: str = "val_accuracy") -> History:
        history = History()
        arms = [""] * len(values) + ["kd_only"] * len(controls)
        for number, (value, control) in enumerate(zip([*values, *controls], arms, strict=True), start=1):
            history.apply(suggested(number, control))
            history.apply(Reported(number, 8, {metric: value}, None))
        history.apply(suggested(99))
        history.apply(suggested(100, "last"))
        return history

    return make


def report(number: int, epoch: int, **metrics: Any) -> tuple[None, Trial, dict[str, Any]]:
    """The arguments of Tune's call for a report."""
    return together(number, {"epoch": epoch, **metrics})


def together(number: int, *epochs: dict[str, Any]) -> tuple[None, Trial, dict[str, Any]]:
    """The arguments of Tune's call for a report of several epochs."""
    usual = {"val_accuracy": 0.5, "val_loss": 1.0, "epoch_seconds": 2.0}
    figures = [usual | epoch if epoch.get("epoch") else epoch for epoch in epochs]
    # What Tune adds to each report.
    result = {EPOCHS: figures, "time_total_s": 3.0, "pid": 77, "hostname": "here", "config": {"lr": 1}}
    return None, Trial("hintsearch", config={"number": number}, stub=True), result


@pytest.fixture
def scheduler(log: SearchLog, digits: Study, suggested: Callable[..., Suggested]) -> RungScheduler:
    """Of a search with the search trials 1, 2, 3 and the control 4, none of which has reported yet."""
    for number in (1, 2, 3):
        log.record(suggested(number))
    log.record(suggested(4, "kd_only"))
    return RungScheduler(log, digits, FailureBudget(5))


def test_first_at_a_rung_goes_on(digits: Study, reached: Reached) -> None:
    assert rung_decision(reached([]), digits, 99, 8, 0.0) == "continue"


@pytest.mark.parametrize(
    ("earlier", "value", "decision"),
    [
        # reduction 3: the cutoff is the value two thirds up from the worst to the best of those before.
        ([0.1, 0.2, 0.3, 0.4], 0.3, "continue"),
        ([0.1, 0.2, 0.3, 0.4], 0.299, "stop"),
        ([0.4, 0.1, 0.3, 0.2], 0.299, "stop"),
        ([0.6], 0.6, "continue"),
        ([0.6], 0.599, "stop"),
        ([0.0, 0.3], 0.2, "continue"),
        ([0.0, 0.3], 0.199, "stop"),
    ],
)
def test_trial_goes_on_from_the_cutoff_upwards(
    digits: Study, reached: Reached, earlier: list[float], value: float, decision: str
) -> None:
    assert rung_decision(reached(earlier), digits, 99, 8, value) == decision


def test_cutoff_depends_on_the_reduction(studied: Callable[..., Study], reached: Reached) -> None:
    history = reached([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rung_decision(history, studied("budget.reduction=2"), 99, 8, 0.3) == "continue"
    assert rung_decision(history, studied("budget.reduction=4"), 99, 8, 0.3) == "stop"


def test_smaller_values_go_on_where_the_objective_is_minimised(studied: Callable[..., Study], reached: Reached) -> None:
    study = studied("objective={metric: val_loss, direction: minimize}")
    history = reached([1.0, 2.0, 3.0, 4.0], metric="val_loss")
    assert rung_decision(history, study, 99, 8, 2.0) == "continue"
    assert rung_decision(history, study, 99, 8, 2.001) == "stop"


def test_control_is_never_stopped(digits: Study, reached: Reached) -> None:
    assert rung_decision(reached([0.9] * 5), digits, 100, 8, 0.0) == "continue"


def test_values_of_controls_count(digits: Study, reached: Reached) -> None:
    assert rung_decision(reached([0.1], controls=[0.8, 0.9]), digits, 99, 8, 0.5) == "stop"


def test_values_of_other_rungs_do_not_count(digits: Study, reached: Reached) -> None:
    assert rung_decision(reached([0.9, 0.9]), digits, 99, 24, 0.1) == "continue"


def test_own_value_does_not_count(digits: Study, reached: Reached) -> None:
    history = reached([0.5])
    history.apply(Reported(99, 8, {"val_accuracy": 0.9}, None))
    assert rung_decision(history, digits, 99, 8, 0.6) == "continue"


def test_repeats_do_not_count(digits: Study, reached: Reached, suggested: Callable[..., Suggested]) -> None:
    history = reached([0.1])
    history.apply(suggested(101, arm="confirm", confirms=1))
    history.apply(Reported(101, 8, {"val_accuracy": 0.9}, None))
    assert rung_decision(history, digits, 99, 8, 0.5) == "continue"


def test_repeat_is_never_stopped(digits: Study, reached: Reached, suggested: Callable[..., Suggested]) -> None:
    history = reached([0.9] * 5)
    history.apply(suggested(101, arm="confirm", confirms=1))
    assert rung_decision(history, digits, 101, 8, 0.0) == "continue"


def test_training_seconds_add_up(scheduler: RungScheduler, log: SearchLog) -> None:
    for epoch in (1, 2, 3):
        scheduler.on_trial_result(*report(1, epoch, epoch_seconds=float(epoch)))
    found = [log.history.trials[1].reports[epoch].metrics["training_seconds"] for epoch in (1, 2, 3)]
    assert found == [1.0, 3.0, 6.0]


def test_epochs_of_one_report_are_journaled_one_by_one(scheduler: RungScheduler, log: SearchLog) -> None:
    scheduler.on_trial_result(*report(2, 8, val_accuracy=0.6))
    epochs = [{"epoch": epoch, "epoch_seconds": float(epoch), "val_accuracy": epoch / 100} for epoch in (6, 7, 8)]
    assert scheduler.on_trial_result(*together(1, *epochs)) == TrialScheduler.STOP
    found = log.history.trials[1].reports
    assert {epoch: found[epoch].metrics["val_accuracy"] for epoch in found} == {6: 0.06, 7: 0.07, 8: 0.08}
    assert [found[epoch].metrics["training_seconds"] for epoch in found] == [6.0, 13.0, 21.0]
    assert [found[epoch].decision for epoch in found] == [None, None, "stop"]


def test_epochs_of_a_report_that_the_journal_has_are_not_recorded_again(
    scheduler: RungScheduler, log: SearchLog
) -> None:
    scheduler.on_trial_result(*report(1, 3))
    scheduler.on_trial_result(*together(1, {"epoch": 2}, {"epoch": 3, "val_accuracy": 0.9}, {"epoch": 4}))
    assert list(log.history.trials[1].reports) == [3, 2, 4]
    assert log.history.trials[1].reports[3].metrics["val_accuracy"] == 0.5


def test_trap_2_no_epoch_after_a_value_that_is_not_finite_is_recorded(scheduler: RungScheduler, log: SearchLog) -> None:
    nan = {"epoch": 2, "val_accuracy": float("nan")}
    assert scheduler.on_trial_result(*together(1, {"epoch": 1}, nan, {"epoch": 3})) == TrialScheduler.STOP
    assert list(log.history.trials[1].reports) == [1]
    finished = log.history.trials[1].finished
    assert finished is not None
    assert "in epoch 2;" in finished.error


def test_epochs_before_a_failure_are_journaled(scheduler: RungScheduler, log: SearchLog) -> None:
    failed = together(1, {"epoch": 1}, {"epoch": 2}, {"failure": "the loss is NaN"})
    assert scheduler.on_trial_result(*failed) == TrialScheduler.STOP
    assert list(log.history.trials[1].reports) == [1, 2]
    assert log.history.trials[1].finished == Finished(1, "failed", "the loss is NaN")


def test_training_seconds_go_on_after_a_resume(scheduler: RungScheduler, log: SearchLog, digits: Study) -> None:
    for epoch in (1, 2):
        scheduler.on_trial_result(*report(1, epoch, epoch_seconds=1.5))
    after_a_restart = SearchLog(log.path)
    after_a_restart.replay(read_journal(log.path).events, torn=0)
    resumed = RungScheduler(after_a_restart, digits, FailureBudget(5))
    # Back to its checkpoint: the second epoch is trained again, and counted once.
    for epoch in (2, 3):
        resumed.on_trial_result(*report(1, epoch, epoch_seconds=1.5))
    assert after_a_restart.history.trials[1].reports[3].metrics["training_seconds"] == 4.5


def test_repeat_goes_on_at_a_rung_where_a_search_trial_is_stopped(
    scheduler: RungScheduler, log: SearchLog, suggested: Callable[..., Suggested]
) -> None:
    log.record(suggested(5, arm="confirm", confirms=1))
    scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6))
    assert scheduler.on_trial_result(*report(5, 8, val_accuracy=0.4)) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(*report(2, 8, val_accuracy=0.4)) == TrialScheduler.STOP


def test_traceback_of_a_failure_that_no_retry_mends_is_journaled(scheduler: RungScheduler, log: SearchLog) -> None:
    scheduler.on_trial_result(*together(1, {"failure": "the loss is not finite", "traceback": "Traceback: here"}))
    assert log.history.trials[1].finished == Finished(1, "failed", "the loss is not finite", "Traceback: here")


def test_nothing_is_stopped_where_a_cost_is_weighed(
    log: SearchLog, studied: Callable[..., Study], suggested: Callable[..., Suggested]
) -> None:
    for number in (1, 2):
        log.record(suggested(number))
    scheduler = RungScheduler(log, studied("objective.against=training_seconds"), FailureBudget(5))
    scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6))
    assert scheduler.on_trial_result(*report(2, 8, val_accuracy=0.4)) == TrialScheduler.CONTINUE
    assert log.history.trials[2].reports[8].decision is None


def test_no_trial_goes_on_when_the_search_is_given_up(
    log: SearchLog, digits: Study, suggested: Callable[..., Suggested]
) -> None:
    failures = FailureBudget(1)
    log.listen(failures)
    for number in (1, 2):
        log.record(suggested(number))
    scheduler = RungScheduler(log, digits, failures)
    assert scheduler.on_trial_result(*report(1, 1)) == TrialScheduler.CONTINUE
    log.record(Finished(2, "failed", "it broke"))
    assert scheduler.on_trial_result(*report(1, 2)) == TrialScheduler.STOP
    # It is left open, for a resume.
    assert log.history.trials[1].finished is None


def test_report_inside_a_rung_goes_on_without_a_decision(scheduler: RungScheduler, log: SearchLog) -> None:
    assert scheduler.on_trial_result(*report(1, 7)) == TrialScheduler.CONTINUE
    assert log.history.trials[1].reports[7].decision is None


def test_last_rung_needs_no_decision(scheduler: RungScheduler, log: SearchLog) -> None:
    assert scheduler.on_trial_result(*report(1, 24)) == TrialScheduler.CONTINUE
    assert log.history.trials[1].reports[24].decision is None


def test_worse_trial_is_stopped_at_a_rung(scheduler: RungScheduler) -> None:
    assert scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6)) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(*report(2, 8, val_accuracy=0.4)) == TrialScheduler.STOP


def test_worse_control_goes_on(scheduler: RungScheduler) -> None:
    scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6))
    assert scheduler.on_trial_result(*report(4, 8, val_accuracy=0.4)) == TrialScheduler.CONTINUE


def test_decision_is_journaled_with_the_report(scheduler: RungScheduler, log: SearchLog) -> None:
    scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6))
    scheduler.on_trial_result(*report(2, 8, val_accuracy=0.4))
    decisions = [event.decision for event in read_journal(log.path).events if isinstance(event, Reported)]
    assert decisions == ["continue", "stop"]


def test_trap_14_our_metrics_alone_are_journaled(scheduler: RungScheduler, log: SearchLog) -> None:
    ours = {"val_accuracy": 0.5, "val_loss": 1.0, "train_loss": 2.0, "loss_hint": 0.1, "lr": 0.05}
    ours |= {"images_per_second": 900.0, "normaliser_1": 0.3}
    scheduler.on_trial_result(*report(1, 1, **ours, time_total_s=3.0, pid=77, hostname="here", config={"lr": 1}))
    assert log.history.trials[1].reports[1].metrics == {**ours, "training_seconds": 2.0}


def test_epoch_that_the_journal_has_is_not_recorded_again(scheduler: RungScheduler, log: SearchLog) -> None:
    scheduler.on_trial_result(*report(1, 3, val_accuracy=0.6))
    before = log.path.read_bytes()
    assert scheduler.on_trial_result(*report(1, 3, val_accuracy=0.7)) == TrialScheduler.CONTINUE
    assert log.path.read_bytes() == before


def test_trial_that_a_journaled_decision_stopped_stays_stopped(scheduler: RungScheduler, log: SearchLog) -> None:
    log.record(Reported(1, 8, {"val_accuracy": 0.5}, "stop"))
    assert scheduler.on_trial_result(*report(1, 8)) == TrialScheduler.STOP


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_trap_2_trial_fails_at_a_value_that_is_not_finite(
    scheduler: RungScheduler, log: SearchLog, value: float
) -> None:
    assert scheduler.on_trial_result(*report(1, 8, val_accuracy=value)) == TrialScheduler.STOP
    finished = log.history.trials[1].finished
    assert finished == Finished(1, "failed", f"val_accuracy is {value} in epoch 8; lower lr or the weights")
    assert log.history.trials[1].reports == {}


def test_trap_2_value_that_is_not_finite_does_not_stop_the_trials_after_it(scheduler: RungScheduler) -> None:
    scheduler.on_trial_result(*report(1, 8, val_accuracy=float("nan")))
    scheduler.on_trial_result(*report(2, 8, val_accuracy=0.6))
    assert scheduler.on_trial_result(*report(3, 8, val_accuracy=0.4)) == TrialScheduler.STOP


def test_trap_2_failure_that_the_trial_reports_is_journaled_with_its_reason(
    scheduler: RungScheduler, log: SearchLog
) -> None:
    assert scheduler.on_trial_result(*together(1, {"failure": "the loss is NaN"})) == TrialScheduler.STOP
    assert log.history.trials[1].finished == Finished(1, "failed", "the loss is NaN")


@pytest.mark.parametrize("why", [NO_ROOM, NOT_SHARED])
def test_trial_that_finds_its_disk_full_or_its_data_gone_is_left_open_and_ends_the_search(
    log: SearchLog, digits: Study, suggested: Callable[..., Suggested], why: str
) -> None:
    failures = FailureBudget(5)
    for number in (1, 2):
        log.record(suggested(number))
    scheduler, before = RungScheduler(log, digits, failures), log.path.read_bytes()
    told = together(1, {why: "the reason"})
    assert scheduler.on_trial_result(*told) == TrialScheduler.STOP
    assert log.path.read_bytes() == before
    assert getattr(failures, why) == "the reason"
    # A trial beside it ends with its epoch, which counts.
    assert scheduler.on_trial_result(*report(2, 3)) == TrialScheduler.STOP
    assert list(log.history.trials[2].reports) == [3]


def test_report_after_the_end_is_not_recorded(scheduler: RungScheduler, log: SearchLog) -> None:
    log.record(Finished(1, "failed", "it broke"))
    before = log.path.read_bytes()
    assert scheduler.on_trial_result(*report(1, 9)) == TrialScheduler.STOP
    assert log.path.read_bytes() == before


def test_trap_3_rungs_are_rebuilt_from_the_journal(scheduler: RungScheduler, log: SearchLog, digits: Study) -> None:
    scheduler.on_trial_result(*report(1, 8, val_accuracy=0.6))
    after_a_restart = SearchLog(log.path)
    after_a_restart.replay(read_journal(log.path).events, torn=0)
    resumed = RungScheduler(after_a_restart, digits, FailureBudget(5))
    assert resumed.on_trial_result(*report(2, 8, val_accuracy=0.4)) == TrialScheduler.STOP


def test_trap_6_scheduler_can_be_pickled(scheduler: RungScheduler) -> None:
    assert isinstance(pickle.loads(pickle.dumps(scheduler)), RungScheduler)


@pytest.fixture
def ranked(studied: Callable[..., Study], scheduler: RungScheduler, log: SearchLog) -> RungScheduler:
    """Of the same trials, in a study that is decided by rankings."""
    return RungScheduler(log, studied("objective.metric=val_map_cosine"), FailureBudget(5))


def test_epoch_without_rankings_goes_on_without_a_decision(ranked: RungScheduler, log: SearchLog) -> None:
    """They are measured at the ends of rungs alone."""
    ranked.on_trial_result(*report(1, 8, val_map_cosine=0.6))
    for epoch in range(1, 8):
        assert ranked.on_trial_result(*report(2, epoch, val_accuracy=0.0)) == TrialScheduler.CONTINUE
    assert {event.decision for event in log.history.trials[2].reports.values()} == {None}


def test_rankings_decide_at_a_rung(ranked: RungScheduler, log: SearchLog) -> None:
    better, worse = {"val_map_cosine": 0.6, "val_accuracy": 0.1}, {"val_map_cosine": 0.4, "val_accuracy": 0.9}
    assert ranked.on_trial_result(*report(1, 8, **better)) == TrialScheduler.CONTINUE
    assert ranked.on_trial_result(*report(2, 8, **worse)) == TrialScheduler.STOP
    assert ranked.on_trial_result(*report(4, 8, **worse)) == TrialScheduler.CONTINUE
    assert [log.history.trials[number].reports[8].decision for number in (1, 2, 4)] == ["continue", "stop", "continue"]


@pytest.mark.parametrize("epoch", [8, 24])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_trial_fails_at_rankings_that_are_not_finite(
    ranked: RungScheduler, log: SearchLog, epoch: int, value: float
) -> None:
    for before in range(1, epoch):
        ranked.on_trial_result(*report(1, before, **({"val_map_cosine": 0.5} if before == 8 else {})))
    assert ranked.on_trial_result(*report(1, epoch, val_map_cosine=value)) == TrialScheduler.STOP
    assert log.history.trials[1].finished == Finished(
        1, "failed", f"val_map_cosine is {value} in epoch {epoch}; lower lr or the weights"
    )


def test_what_is_in_halves_for_want_of_memory_is_journaled(scheduler: RungScheduler, log: SearchLog) -> None:
    ours = {"val_accuracy": 0.5, "val_loss": 1.0, "accumulation_steps": 2.0, "halved_passes": 1.0}
    scheduler.on_trial_result(*report(1, 1, **ours))
    assert log.history.trials[1].reports[1].metrics == {**ours, "training_seconds": 2.0}


def test_metrics_of_rankings_warmup_and_weights_are_journaled(ranked: RungScheduler, log: SearchLog) -> None:
    ours = {"val_accuracy": 0.5, "val_loss": 1.0, "val_map_cosine": 0.6, "val_precision_at_100_l2": 0.2}
    ours |= {"warmup_seconds": 2.0, "warmup_loss_1": 0.3, "hint_weight.logit": 1.1, "hint_weight.at.layer1.0": 0.9}
    ranked.on_trial_result(*report(1, 8, **ours, warmup=3, hint=4))
    assert log.history.trials[1].reports[8].metrics == {**ours, "training_seconds": 2.0}
