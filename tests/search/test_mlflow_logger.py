import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
from hintsearch.search import mlflow_logger
from hintsearch.search.events import Began, Event, Finished, Prepared, Reported, Retried, Suggested, Tracked
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.mlflow_logger import GATHER_SECONDS, HINT_FILE, TRACEBACK_FILE, MlflowLogger
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.tracking import PARENT_TAG, EpochMetrics, TrackedSearch
from hintsearch.search.trial import HintResolver
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

numbers = count(1)

Attach = Callable[..., MlflowLogger]
Runs = Callable[[], dict[int, Run]]


@pytest.fixture
def tracked(client: MlflowClient) -> TrackedSearch:
    return TrackedSearch(client, f"logger-{next(numbers)}", "a search", None)


@pytest.fixture
def attach(tracked: TrackedSearch) -> Attach:
    """A logger on the search's runs that follows a log, after catching up with what has been replayed to it."""

    def make(log: SearchLog) -> MlflowLogger:
        logger = MlflowLogger(tracked, log)
        logger.catch_up()
        log.listen(logger)
        return logger

    return make


@pytest.fixture
def resumed(log: SearchLog) -> Callable[[], SearchLog]:
    """A new log that has replayed the journal, as after a restart."""

    def make() -> SearchLog:
        again = SearchLog(log.path)
        again.replay(read_journal(log.path).events, torn=0)
        return again

    return make


@pytest.fixture
def runs(client: MlflowClient, tracked: TrackedSearch) -> Runs:
    """The runs of the search's trials, by number; no number twice."""

    def find() -> dict[int, Run]:
        parent = client.get_run(tracked.parent_run_id)
        children = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{tracked.parent_run_id}'")
        found = {int(run.data.tags["trial"]): run for run in children}
        assert len(found) == len(children)
        return found

    return find


def metrics(epoch: int) -> dict[str, float]:
    return {"val_accuracy": epoch / 100, "val_loss": 1 / epoch, "train_loss": 2 / epoch, "lr": 0.1}


def reports(number: int, *epochs: int) -> list[Event]:
    return [Reported(number, epoch, metrics(epoch), None) for epoch in epochs]


@pytest.fixture
def course(suggested: Callable[..., Suggested]) -> list[Event]:
    """Trials 1 completed, 2 pruned, 3 failed, 4 not at its end."""
    return [
        Prepared("abc123", "teacher.safetensors", 0.9),
        suggested(1, "stage_ends"),
        *reports(1, 1, 8),
        suggested(2),
        *reports(1, 24),
        Finished(1, "completed", ""),
        *reports(2, 8),
        Finished(2, "pruned", ""),
        suggested(3),
        Finished(3, "failed", "the loss is not finite"),
        suggested(4),
        *reports(4, 1, 2),
    ]


@pytest.fixture
def logged(log: SearchLog, attach: Attach, course: list[Event]) -> SearchLog:
    """The log of an interrupted search, all of which is in MLflow."""
    logger = attach(log)
    for event in course:
        log.record(event)
    assert logger.close(interrupted=True) == 0
    return log


def steps(client: MlflowClient, run: Run, metric: str = "val_accuracy") -> list[int]:
    return sorted(entry.step for entry in client.get_metric_history(run.info.run_id, metric))


def test_trap_14_each_trial_has_one_run(logged: SearchLog, runs: Runs) -> None:
    assert set(runs()) == {1, 2, 3, 4}


def test_trap_14_outcome_is_the_run_s_status_and_none_is_left_running(logged: SearchLog, runs: Runs) -> None:
    ended = {number: (run.info.status, run.data.tags["outcome"]) for number, run in runs().items()}
    assert ended == {
        1: ("FINISHED", "completed"),
        2: ("FINISHED", "pruned"),
        3: ("FAILED", "failed"),
        4: ("KILLED", "interrupted"),
    }


def test_run_has_the_tags_of_its_trial(logged: SearchLog, runs: Runs) -> None:
    control, search = runs()[1].data.tags, runs()[2].data.tags
    assert (control["arm"], control["control"], control["teacher.sha256"]) == ("control", "stage_ends", "abc123")
    assert search["arm"] == "search"
    assert "control" not in search


def test_failed_run_says_why(logged: SearchLog, runs: Runs) -> None:
    assert runs()[3].data.tags["error"] == "the loss is not finite"


def test_parameters_of_a_search_trial_are_the_run_s(logged: SearchLog, runs: Runs) -> None:
    suggested = logged.history.trials[2].suggested
    params = runs()[2].data.params
    assert {name: params[name] for name in suggested.parameters} == {
        name: str(value) for name, value in suggested.parameters.items()
    }
    assert params["hints.points"].split(",") == suggested.selection["points"]
    first = suggested.hints["pairs"][0]
    assert params["hints.pairs"].startswith(f"{first['teacher_layer']}→{first['student_layer']}")


def test_parameters_of_a_control_show_its_points(logged: SearchLog, runs: Runs) -> None:
    params = runs()[1].data.params
    assert params["hints.points"] == "layer1.2,layer2.2,layer3.2"
    assert params["hints.pairs"] == "layer1.2→layer1.0,layer2.2→layer2.0,layer3.2→layer3.0"
    assert "hints.metrics" not in params


@pytest.mark.parametrize("control", ["no_distillation", "kd_only"])
def test_control_without_hints_shows_its_name_as_selector(
    log: SearchLog, attach: Attach, runs: Runs, suggested: Callable[..., Suggested], control: str
) -> None:
    logger = attach(log)
    log.record(suggested(1, control))
    logger.close(interrupted=True)
    params = runs()[1].data.params
    assert params["hints.selector"] == control
    assert "hints.points" not in params


def test_metrics_are_logged_by_real_epoch(client: MlflowClient, logged: SearchLog, runs: Runs) -> None:
    run = runs()[1]
    assert steps(client, run) == [1, 8, 24]
    assert run.data.metrics == {**metrics(24), "epoch": 24.0}


def test_hint_configuration_is_an_artifact_of_the_run(client: MlflowClient, logged: SearchLog, runs: Runs) -> None:
    content = json.loads(Path(client.download_artifacts(runs()[2].info.run_id, HINT_FILE)).read_text())
    suggested = logged.history.trials[2].suggested
    assert content == {
        "hints": suggested.hints,
        "selection": suggested.selection,
        "parameters": suggested.parameters,
        "seeds": {"data_seed": suggested.data_seed, "init_seed": suggested.init_seed},
    }


def test_run_ids_are_journaled_once(logged: SearchLog, runs: Runs) -> None:
    journaled = [(e.number, e.run_id) for e in read_journal(logged.path).events if isinstance(e, Tracked)]
    assert sorted(journaled) == sorted((number, run.info.run_id) for number, run in runs().items())


def test_trap_14_second_logger_adds_nothing_twice(
    client: MlflowClient, logged: SearchLog, attach: Attach, resumed: Callable[[], SearchLog], runs: Runs
) -> None:
    before = runs()
    assert attach(resumed()).close(interrupted=True) == 0
    after = runs()
    assert {n: r.info.run_id for n, r in after.items()} == {n: r.info.run_id for n, r in before.items()}
    assert steps(client, after[1]) == [1, 8, 24]
    assert steps(client, after[4]) == [1, 2]
    assert len(client.get_metric_history(after[4].info.run_id, "train_loss")) == 2


def test_interrupted_run_goes_on_under_its_id(
    client: MlflowClient, logged: SearchLog, attach: Attach, resumed: Callable[[], SearchLog], runs: Runs
) -> None:
    before = runs()[4]
    log = resumed()
    logger = attach(log)
    for event in (*reports(4, 8, 24), Finished(4, "completed", "")):
        log.record(event)
    assert logger.close(interrupted=False) == 0
    after = runs()[4]
    assert after.info.run_id == before.info.run_id
    assert (after.info.status, after.data.tags["outcome"]) == ("FINISHED", "completed")
    assert steps(client, after) == [1, 2, 8, 24]


def test_what_is_journaled_but_not_logged_is_filled_in(
    client: MlflowClient, logged: SearchLog, attach: Attach, resumed: Callable[[], SearchLog], runs: Runs
) -> None:
    """The last reports before a crash: the journal has them, MLflow has not."""
    crashed = resumed()
    for event in (*reports(4, 3, 8), Finished(4, "pruned", "")):
        crashed.record(event)
    assert attach(resumed()).close(interrupted=False) == 0
    assert steps(client, runs()[4]) == [1, 2, 3, 8]
    assert (runs()[4].info.status, runs()[4].data.tags["outcome"]) == ("FINISHED", "pruned")


def test_search_of_which_nothing_was_logged_is_filled_in(
    client: MlflowClient,
    log: SearchLog,
    course: list[Event],
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
) -> None:
    for event in course:
        log.record(event)
    assert attach(resumed()).close(interrupted=True) == 0
    assert {number: run.info.status for number, run in runs().items()} == {
        1: "FINISHED",
        2: "FINISHED",
        3: "FAILED",
        4: "KILLED",
    }
    assert steps(client, runs()[1]) == [1, 8, 24]


def test_run_whose_id_the_journal_lost_is_found(
    log: SearchLog,
    tracked: TrackedSearch,
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
    suggested: Callable[..., Suggested],
) -> None:
    """A crash after the run was made and before anything else: parameters are missing, too."""
    log.record(suggested(1))
    run_id = tracked.create_trial(1, {"arm": "search"})
    attach(resumed()).close(interrupted=True)
    assert runs()[1].info.run_id == run_id
    assert "weight.hint" in runs()[1].data.params


def test_run_that_was_made_by_a_request_that_failed_is_found(
    tracked: TrackedSearch,
    log: SearchLog,
    attach: Attach,
    suggested: Callable[..., Suggested],
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_trial = tracked.create_trial

    def lose_the_answer(number: int, tags: dict[str, str]) -> str:
        create_trial(number, tags)
        raise MlflowException("the connection was closed")

    monkeypatch.setattr(tracked, "create_trial", lose_the_answer)
    logger = attach(log)
    log.record(suggested(1))
    assert logger.close(interrupted=True) == 0
    # Under one number there is one run.
    assert runs()[1].info.status == "KILLED"


def test_trial_that_goes_on_is_shown_as_running(
    logged: SearchLog, attach: Attach, resumed: Callable[[], SearchLog], runs: Runs
) -> None:
    assert attach(resumed()).close(interrupted=False) == 0
    assert runs()[4].info.status == "RUNNING"


@contextmanager
def store_away(client: MlflowClient) -> Iterator[None]:
    """The store fails every request inside the block: its file is not where it was."""
    file = Path(client.tracking_uri.removeprefix("sqlite:///"))
    away = file.with_name("away.db")
    file.rename(away)
    try:
        yield
    finally:
        away.rename(file)


def test_trap_14_dead_store_holds_up_no_event(
    client: MlflowClient, log: SearchLog, attach: Attach, course: list[Event], runs: Runs
) -> None:
    logger = attach(log)
    with store_away(client):
        started = time.monotonic()
        for event in course:
            log.record(event)
        assert time.monotonic() - started < 2
        time.sleep(GATHER_SECONDS + 0.2)  # the first attempts fail
    assert logger.close(interrupted=True) == 0
    assert steps(client, runs()[1]) == [1, 8, 24]


def test_trap_14_writes_that_a_dead_store_has_not_taken_are_counted_and_sent_by_a_resume(
    client: MlflowClient,
    log: SearchLog,
    attach: Attach,
    course: list[Event],
    resumed: Callable[[], SearchLog],
    runs: Runs,
) -> None:
    logger = attach(log)
    with store_away(client):
        for event in course:
            log.record(event)
        missing = logger.close(interrupted=True, seconds=0.3)
    assert missing >= len(course) - 1  # all but the teacher, and the interruption
    assert attach(resumed()).close(interrupted=True) == 0
    assert steps(client, runs()[1]) == [1, 8, 24]
    assert set(runs()) == {1, 2, 3, 4}


def test_epochs_of_a_moment_go_out_in_one_request(
    client: MlflowClient,
    tracked: TrackedSearch,
    log: SearchLog,
    attach: Attach,
    suggested: Callable[..., Suggested],
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[list[int]] = []
    log_epochs = tracked.log_epochs

    def send(run_id: str, epochs: Sequence[EpochMetrics]) -> None:
        sent.append([epoch.number for epoch in epochs])
        log_epochs(run_id, epochs)

    monkeypatch.setattr(tracked, "log_epochs", send)
    # Closing the logger ends the moment.
    monkeypatch.setattr(mlflow_logger, "GATHER_SECONDS", 60)
    logger = attach(log)
    # What is between them is another trial's, or an outcome.
    two = [suggested(1), suggested(2, "kd_only"), *reports(1, 1), *reports(2, 1), *reports(1, 2), *reports(2, 2)]
    for event in (*two, Finished(2, "pruned", ""), *reports(1, 3)):
        log.record(event)
    assert logger.close(interrupted=True) == 0
    assert sent == [[1, 2, 3], [1, 2]]
    assert steps(client, runs()[1]) == [1, 2, 3]
    assert runs()[2].data.tags["outcome"] == "pruned"


def test_retried_trial_s_epochs_keep_their_order(
    tracked: TrackedSearch,
    log: SearchLog,
    attach: Attach,
    suggested: Callable[..., Suggested],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_logger, "GATHER_SECONDS", 60)
    done: list[object] = []
    log_epochs, tag = tracked.log_epochs, tracked.tag
    monkeypatch.setattr(tracked, "log_epochs", lambda r, e: (done.append([i.number for i in e]), log_epochs(r, e)))
    monkeypatch.setattr(tracked, "tag", lambda r, t: (done.append(t.get("retries", "end")), tag(r, t)))
    logger = attach(log)
    for event in (suggested(1), *reports(1, 1, 2), Retried(1, 1, "it broke"), *reports(1, 3)):
        log.record(event)
    assert logger.close(interrupted=True) == 0
    assert done == [[1, 2], "1", [3], "end"]


def ranked(number: int, *epochs: int) -> list[Event]:
    """Reports of a search that is decided by rankings, which epochs between two rungs do not have."""
    rankings = {8: {"val_map_cosine": 0.4}, 24: {"val_map_cosine": 0.6}}
    return [Reported(number, epoch, metrics(epoch) | rankings.get(epoch, {}), None) for epoch in epochs]


def test_epochs_without_the_objective_are_not_logged_again_after_an_interruption(
    client: MlflowClient,
    log: SearchLog,
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
    suggested: Callable[..., Suggested],
) -> None:
    logger = attach(log)
    for event in (suggested(1), *ranked(1, 7, 8, 9)):
        log.record(event)
    assert logger.close(interrupted=True) == 0
    # The journal was ahead of the store when the process died.
    again = resumed()
    for event in ranked(1, 10, 24):
        again.record(event)
    assert attach(resumed()).close(interrupted=True) == 0
    found = {
        metric: client.get_metric_history(runs()[1].info.run_id, metric)
        for metric in ("epoch", "train_loss", "val_map_cosine")
    }
    assert {metric: [entry.step for entry in history] for metric, history in found.items()} == {
        "epoch": [7, 8, 9, 10, 24],
        "train_loss": [7, 8, 9, 10, 24],
        "val_map_cosine": [8, 24],
    }
    assert [entry.value for entry in found["epoch"]] == [7, 8, 9, 10, 24]


@pytest.mark.parametrize("written", ["hkd", "none"])
def test_runs_say_whether_their_weights_are_dynamic_where_the_study_wants_that(
    log: SearchLog,
    attach: Attach,
    runs: Runs,
    studied: Callable[..., Study],
    suggested: Callable[..., Suggested],
    written: str,
) -> None:
    study = studied(f"dynamic_weights={written}")
    logger = attach(log)
    log.record(Began("a search", study.resolved(), "0", "sqlite://"))
    for number, dynamic in ((1, {"hidden": 100}), (2, None)):
        trial = suggested(number)
        log.record(replace(trial, hints={**trial.hints, "dynamic_weights": dynamic}))
    logger.close(interrupted=True)
    tags = [runs()[number].data.tags.get("hint_weights") for number in (1, 2)]
    assert tags == (["dynamic", "fixed"] if written == "hkd" else [None, None])


def test_each_two_layers_of_a_combination_are_shown_once(
    log: SearchLog, attach: Attach, runs: Runs, studied: Callable[..., Study], resolver: HintResolver
) -> None:
    parameters, distributions = ArmSampler(studied("space.loss.hint=at+sp"), "any", 3).suggest(1, "stage_ends")
    hints, selection = resolver.resolve(1, "stage_ends", parameters)
    assert selection is not None
    chosen = json.loads(json.dumps(asdict(selection)))
    logger = attach(log)
    log.record(Suggested(1, "control", "stage_ends", parameters, distributions, hints.to_dict(), chosen))
    logger.close(interrupted=True)
    params = runs()[1].data.params
    assert len(hints.pairs) == 6
    assert params["hints.pairs"] == "layer1.2→layer1.0,layer2.2→layer2.0,layer3.2→layer3.0"
    assert (params["loss.hint"], params["weight.hint"], params["weight.hint.2"]) == ("at+sp", "1.0", "1.0")


ATTEMPTS = "first attempt:\n  RuntimeError: it broke\nsecond attempt:\n  RuntimeError: it broke again\n"


@pytest.fixture
def retried(suggested: Callable[..., Suggested]) -> list[Event]:
    """Trial 1 failed for good at its second attempt, 2 succeeded at its second one."""
    return [
        suggested(1),
        Retried(1, 1, "RuntimeError: it broke"),
        Finished(1, "failed", "RuntimeError: it broke again", ATTEMPTS),
        suggested(2),
        Retried(2, 1, "the trial's process died"),
        *reports(2, 8, 24),
        Finished(2, "completed", ""),
    ]


def artifacts(client: MlflowClient, run: Run) -> set[str]:
    return {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.fixture
def retries_logged(log: SearchLog, attach: Attach, retried: list[Event]) -> None:
    """The events of the retried trials are in the store."""
    logger = attach(log)
    for event in retried:
        log.record(event)
    assert logger.close(interrupted=False) == 0


def test_tracebacks_of_all_attempts_are_an_artifact_of_a_failed_run(
    client: MlflowClient, runs: Runs, retries_logged: None
) -> None:
    assert Path(client.download_artifacts(runs()[1].info.run_id, TRACEBACK_FILE)).read_text() == ATTEMPTS
    assert artifacts(client, runs()[2]) == {HINT_FILE}


def test_run_says_how_often_its_trial_was_begun_again(runs: Runs, retries_logged: None) -> None:
    assert [runs()[number].data.tags.get("retries") for number in (1, 2)] == ["1", "1"]


def test_completed_run_says_no_error_whatever_it_was_retried_for(runs: Runs, retries_logged: None) -> None:
    assert not runs()[2].data.tags.get("error")


@pytest.mark.parametrize("number", [1, 2])
def test_retries_of_which_nothing_was_logged_are_filled_in(
    client: MlflowClient,
    log: SearchLog,
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
    retried: list[Event],
    number: int,
) -> None:
    for event in retried:
        log.record(event)
    assert attach(resumed()).close(interrupted=False) == 0
    assert runs()[number].data.tags.get("retries") == "1"
    (why,) = (event.error for event in retried if isinstance(event, Retried) and event.number == number)
    assert runs()[number].data.tags.get("retry.error") == why


def test_traceback_of_which_nothing_was_logged_is_filled_in(
    client: MlflowClient,
    log: SearchLog,
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
    retried: list[Event],
) -> None:
    for event in retried:
        log.record(event)
    assert attach(resumed()).close(interrupted=False) == 0
    assert TRACEBACK_FILE in artifacts(client, runs()[1])
    assert runs()[1].data.tags["error"] == "RuntimeError: it broke again"


def test_trap_14_second_logger_changes_nothing_of_retried_trials(
    client: MlflowClient,
    log: SearchLog,
    attach: Attach,
    resumed: Callable[[], SearchLog],
    runs: Runs,
    retried: list[Event],
) -> None:
    logger = attach(log)
    for event in retried:
        log.record(event)
    assert logger.close(interrupted=False) == 0
    before = {number: (run.data.tags, artifacts(client, run), steps(client, run)) for number, run in runs().items()}
    assert attach(resumed()).close(interrupted=True) == 0
    after = {number: (run.data.tags, artifacts(client, run), steps(client, run)) for number, run in runs().items()}
    assert after == before


def test_run_of_a_repeat_says_what_it_confirms_and_its_seeds(
    log: SearchLog, attach: Attach, runs: Runs, suggested: Callable[..., Suggested]
) -> None:
    logger = attach(log)
    log.record(suggested(1))
    log.record(suggested(2, arm="confirm", confirms=1, data_seed=17, init_seed=18))
    logger.close(interrupted=True)
    tags, params = runs()[2].data.tags, runs()[2].data.params
    assert (tags["arm"], tags["confirms"]) == ("confirm", "1")
    assert (params["data_seed"], params["init_seed"]) == ("17", "18")
    assert "confirms" not in runs()[1].data.tags


def test_failure_of_the_logger_s_own_is_raised_at_the_end(
    log: SearchLog, attach: Attach, suggested: Callable[..., Suggested]
) -> None:
    logger = attach(log)
    broken = replace(suggested(1), selection={"points": None})
    log.record(broken)
    with pytest.raises(TypeError):
        logger.close(interrupted=False)
