import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hintsearch.search.epoch_reports import EPOCHS
from hintsearch.search.events import Checkpointed, Event, Finished, Reported, Suggested
from hintsearch.search.failures import FailureBudget
from hintsearch.search.interrupts import RayEndedError
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.searcher import JournalSearcher, TrialRecorder, close_decided
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver, tune_config
from hintsearch.search.tuning import trial_directory
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher


@pytest.mark.parametrize(
    ("reports", "outcome"),
    [
        ([Reported(1, 8, {}, "stop")], "pruned"),
        ([Reported(1, 8, {}, "continue"), Reported(1, 24, {}, None)], "completed"),
        ([Reported(1, 8, {}, "continue"), Reported(1, 23, {}, None)], None),
        ([], None),
    ],
)
def test_outcome_that_the_journal_decides_is_recorded(
    log: SearchLog,
    suggested: Callable[..., Suggested],
    record_all: Callable[..., None],
    reports: list[Event],
    outcome: str | None,
) -> None:
    record_all(log, suggested(1), *reports)
    close_decided(log, 24)
    finished = log.history.trials[1].finished
    assert (finished.outcome if finished else None) == outcome


def test_finished_trial_is_not_closed_again(
    log: SearchLog, suggested: Callable[..., Suggested], record_all: Callable[..., None]
) -> None:
    record_all(log, suggested(1), Reported(1, 8, {}, "stop"), Finished(1, "failed", "it broke"))
    close_decided(log, 24)
    assert log.history.trials[1].finished == Finished(1, "failed", "it broke")


@pytest.fixture(scope="module")
def planned(studied: Callable[..., Study]) -> Study:
    """Of two controls and a search trial; nothing is confirmed."""
    return studied("controls={arms: [kd_only, random], trials: 2}", "budget.trials=1", "confirm.seeds=0")


@pytest.fixture
def failures() -> FailureBudget:
    return FailureBudget(2)


@pytest.fixture
def searcher(log: SearchLog, planned: Study, resolver: HintResolver, failures: FailureBudget) -> JournalSearcher:
    sampler = ArmSampler(planned, "a search", 3)
    log.listen(sampler)
    log.listen(failures)
    return JournalSearcher(log, sampler, resolver, planned, failures)


def test_trials_are_handed_out_in_the_order_of_the_plan(searcher: JournalSearcher) -> None:
    assert [searcher.suggest(name)["number"] for name in "abc"] == [1, 2, 3]


def test_searcher_is_finished_after_the_plan(searcher: JournalSearcher) -> None:
    for name in "abc":
        searcher.suggest(name)
    assert searcher.suggest("d") == Searcher.FINISHED


def test_nothing_follows_when_the_search_is_given_up(
    searcher: JournalSearcher, log: SearchLog, suggested: Callable[..., Suggested]
) -> None:
    for name in "ab":
        number = searcher.suggest(name)["number"]
        log.record(Finished(number, "failed", "it broke"))
    assert searcher.suggest("c") == Searcher.FINISHED
    assert 3 not in log.history.trials


def test_nothing_follows_a_full_disk(searcher: JournalSearcher, log: SearchLog, failures: FailureBudget) -> None:
    searcher.suggest("a")
    failures.no_room = "No space left on device"
    assert searcher.suggest("b") == Searcher.FINISHED
    assert list(log.history.trials) == [1]


def test_suggestion_is_in_the_journal_when_tune_gets_it(searcher: JournalSearcher, log: SearchLog) -> None:
    config = searcher.suggest("a")
    (event,) = read_journal(log.path).events
    assert isinstance(event, Suggested)
    assert (event.number, event.arm, event.control) == (1, "control", "kd_only")
    assert config["lr"] == event.parameters["lr"]
    assert config["hints"]["logit_weight"] == event.hints["logit_weight"]


def test_suggestion_holds_what_its_parameters_resolve_to(searcher: JournalSearcher, log: SearchLog) -> None:
    for name in "abc":
        searcher.suggest(name)
    suggested = log.history.trials[3].suggested
    points = suggested.selection["points"]
    assert len(points) == suggested.parameters["hints.clusters"]
    assert [pair["teacher_layer"] for pair in suggested.hints["pairs"]] == list(points)


def test_new_trial_starts_without_a_checkpoint(searcher: JournalSearcher) -> None:
    assert searcher.suggest("a")["checkpoint"] is None


def test_unfinished_trial_is_issued_again_with_its_parameters_and_checkpoint(
    log: SearchLog,
    planned: Study,
    resolver: HintResolver,
    suggested: Callable[..., Suggested],
    failures: FailureBudget,
) -> None:
    before = suggested(1, "kd_only")
    sampler = ArmSampler(planned, "a search", 3)
    log.listen(sampler)
    for event in (before, Checkpointed(1, 8, "here"), Checkpointed(1, 16, "there")):
        log.record(event)
    journal = log.path.read_bytes()
    config = JournalSearcher(log, sampler, resolver, planned, failures).suggest("a")
    assert config == tune_config(before, "there")
    assert log.path.read_bytes() == journal


@pytest.mark.parametrize(
    ("reports", "finished"),
    [
        ([Reported(1, 8, {"val_accuracy": 0.1}, "stop")], Finished(1, "pruned", "")),
        ([Reported(1, 24, {"val_accuracy": 0.1}, None)], Finished(1, "completed", "")),
        ([Reported(1, 9, {"val_accuracy": 0.1}, None)], None),
    ],
)
def test_trial_that_tune_ends_has_the_outcome_of_its_reports(
    searcher: JournalSearcher, log: SearchLog, reports: list[Event], finished: Finished | None
) -> None:
    searcher.suggest("a")
    for report in reports:
        log.record(report)
    searcher.on_trial_complete("a", {})
    assert log.history.trials[1].finished == finished


def test_outcome_that_is_known_is_not_recorded_again(searcher: JournalSearcher, log: SearchLog) -> None:
    searcher.suggest("a")
    log.record(Reported(1, 24, {"val_accuracy": 0.1}, None))
    log.record(Finished(1, "failed", "it broke"))
    searcher.on_trial_complete("a", {})
    assert log.history.trials[1].finished == Finished(1, "failed", "it broke")


def test_error_is_left_to_the_recorder(searcher: JournalSearcher, log: SearchLog) -> None:
    searcher.suggest("a")
    log.record(Reported(1, 24, {"val_accuracy": 0.1}, None))
    searcher.on_trial_complete("a", error=True)
    assert log.history.trials[1].finished is None


def test_trap_6_searcher_can_be_pickled(searcher: JournalSearcher) -> None:
    assert isinstance(pickle.loads(pickle.dumps(searcher)), JournalSearcher)


def test_tune_s_restore_is_refused(searcher: JournalSearcher) -> None:
    with pytest.raises(RuntimeError, match="--resume"):
        searcher.restore("anywhere")


@pytest.fixture
def recorder(log: SearchLog, suggested: Callable[..., Suggested]) -> TrialRecorder:
    log.record(suggested(1))
    return TrialRecorder(log)


def test_checkpoint_is_journaled_with_its_epoch(recorder: TrialRecorder, log: SearchLog) -> None:
    trial = Trial("hintsearch", config={"number": 1}, stub=True)
    trial.update_last_result({EPOCHS: [{"epoch": 7}, {"epoch": 8}]})
    recorder.on_checkpoint(0, [], trial, tune.Checkpoint("/storage/checkpoint_000001"))
    assert log.history.trials[1].checkpoint == Checkpointed(1, 8, "/storage/checkpoint_000001")


def test_figures_of_a_trial_that_is_over_are_not_kept_by_tune(recorder: TrialRecorder) -> None:
    trial = Trial("hintsearch", config={"number": 1}, stub=True)
    trial.update_last_result({EPOCHS: [{"epoch": 7}, {"epoch": 8}], "time_total_s": 3.0})
    assert "time_total_s" in trial.metric_analysis
    recorder.on_trial_complete(0, [], trial)
    assert trial.last_result[EPOCHS] == [{"epoch": 8}]
    assert not trial.metric_analysis
    assert not trial.metric_n_steps


def test_failure_that_is_known_keeps_its_reason(recorder: TrialRecorder, log: SearchLog) -> None:
    log.record(Finished(1, "failed", "the loss is not finite"))
    recorder.on_trial_error(0, [], Trial("hintsearch", config={"number": 1}, stub=True))
    assert log.history.trials[1].finished == Finished(1, "failed", "the loss is not finite")


@pytest.mark.parametrize("event", ["on_trial_recover", "on_trial_error"])
def test_trial_whose_process_ended_with_ray_on_the_driver_s_machine_has_not_failed(
    event: str, recorder: TrialRecorder, log: SearchLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "error.txt"
    said.write_text(
        "Failure # 1 (occurred at 2026-01-01_00-00-00)\nThe actor died unexpectedly before finishing this task.\n"
        "The actor is dead because its owner has died. Owner Id: 01 Worker exit detail: Owner's node has crashed.\n"
    )
    monkeypatch.setattr(Trial, "error_file", str(said))
    with pytest.raises(RayEndedError, match="Ray on this machine has ended"):
        getattr(recorder, event)(0, [], Trial("hintsearch", config={"number": 1}, stub=True))
    assert (log.history.trials[1].finished, log.history.trials[1].retries) == (None, 0)


def breaks(config: dict[str, int]) -> None:
    """A trainable that raises as trial 1, and whose process dies as trial 2."""
    tune.report({EPOCHS: [{"epoch": 1}]})
    if config["number"] == 1:
        raise RuntimeError("it broke")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def broken(
    shared_ray: None, tmp_path_factory: pytest.TempPathFactory, suggested: Callable[..., Suggested]
) -> dict[int, Finished | None]:
    """How two trials of a real Tune experiment ended."""
    folder = tmp_path_factory.mktemp("tune")
    log = SearchLog(folder / "journal.jsonl")
    for number in (1, 2):
        log.record(suggested(number))
    tuner = tune.Tuner(
        breaks,
        param_space={"number": tune.grid_search([1, 2])},
        tune_config=tune.TuneConfig(trial_dirname_creator=trial_directory),
        run_config=tune.RunConfig(name="1", storage_path=str(folder), callbacks=[TrialRecorder(log)], verbose=0),
    )
    tuner.fit()
    return {number: trial.finished for number, trial in log.history.trials.items()}


def test_exception_of_a_trial_is_journaled(broken: dict[int, Finished | None]) -> None:
    finished = broken[1]
    assert finished is not None
    assert (finished.outcome, finished.error) == ("failed", "RuntimeError: it broke")
    assert 'raise RuntimeError("it broke")' in finished.traceback


def test_death_of_a_trial_s_process_is_journaled(broken: dict[int, Finished | None]) -> None:
    finished = broken[2]
    assert finished is not None
    assert finished.outcome == "failed"
    assert "worker process has died" in finished.error
