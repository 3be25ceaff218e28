import time
from collections.abc import Callable, Mapping
from itertools import count

import pytest
from hintsearch.analysis.trials import PARENT_TAG, SearchRecord, read_search
from hintsearch.models.errors import InputError
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

numbers = count(1)


@pytest.fixture
def experiment(client: MlflowClient, request: pytest.FixtureRequest) -> str:
    """Name of an experiment of the test's own."""
    name = f"{request.node.originalname}-{next(numbers)}"
    client.create_experiment(name)
    return name


@pytest.fixture
def launch(client: MlflowClient, experiment: str) -> Callable[..., str]:
    """Makes the run of a search in the experiment, each a millisecond after the last; returns its id."""
    starts = count(round(time.time() * 1000))

    def make(search: str, **tags: str) -> str:
        experiment_id = client.get_experiment_by_name(experiment).experiment_id
        run = client.create_run(experiment_id, start_time=next(starts), tags={"search": search, **tags})
        return str(run.info.run_id)

    return make


@pytest.fixture
def add_trial(client: MlflowClient) -> Callable[..., str]:
    """Makes the run of a trial below a search's run; `values` are those of the objective by epoch."""

    def make(parent: str, number: int, values: Mapping[int, float], metric: str = "val_accuracy", **tags: str) -> str:
        run = client.create_run(
            client.get_run(parent).info.experiment_id, tags={PARENT_TAG: parent, "trial": str(number), "arm": "search"}
        )
        metrics = [
            Metric(name, value, 0, epoch)
            for epoch, reported in values.items()
            for name, value in ((metric, reported), ("epoch", float(epoch)))
        ]
        params = [Param("loss.hint", "at"), Param("weight.hint", str(number))]
        client.log_batch(run.info.run_id, metrics, params, [RunTag(key, value) for key, value in tags.items()])
        return str(run.info.run_id)

    return make


@pytest.fixture
def searched(experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]) -> str:
    """Name of a search with trials of every kind."""
    name = f"search of {experiment}"
    parent = launch(name, objective="val_accuracy", direction="maximize")
    add_trial(parent, 1, {8: 0.5, 24: 0.7}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {8: 0.9}, outcome="pruned")
    add_trial(parent, 3, {8: 0.6, 24: 0.9}, outcome="completed")
    add_trial(parent, 4, {8: 0.3}, outcome="pruned")
    add_trial(parent, 5, {}, outcome="failed", error="it broke")
    add_trial(parent, 6, {8: 0.6, 24: 0.8}, outcome="completed")
    add_trial(parent, 7, {3: 0.2})
    return name


def order(record: SearchRecord) -> list[int]:
    return [trial.number for trial in record.trials]


def test_trials_are_completed_ones_by_value_then_others_by_epochs_and_value(
    client: MlflowClient, searched: str
) -> None:
    assert order(read_search(client, searched)) == [3, 6, 1, 2, 4, 7, 5]


def test_smallest_value_comes_first_where_it_is_to_be_minimised(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    name = f"search of {experiment}"
    parent = launch(name, objective="val_loss", direction="minimize")
    for number, value in ((1, 0.5), (2, 0.3), (3, 0.4)):
        add_trial(parent, number, {24: value}, "val_loss", outcome="completed")
    record = read_search(client, name)
    assert (record.metric, record.direction, order(record)) == ("val_loss", "minimize", [2, 3, 1])


def test_equal_trials_stand_by_number(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    name = f"search of {experiment}"
    parent = launch(name)
    for number in (2, 3, 1):
        add_trial(parent, number, {24: 0.5}, outcome="completed")
    assert order(read_search(client, name)) == [1, 2, 3]


def test_best_is_the_best_completed_trial_of_its_arm(client: MlflowClient, searched: str) -> None:
    record = read_search(client, searched)
    best, control = record.best("search"), record.best("control")
    assert best is not None
    assert control is not None
    assert (best.number, control.number, record.best("confirm")) == (3, 1, None)


def test_winner_is_the_best_of_the_search_even_if_a_control_is_better(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    parent = launch(f"search of {experiment}")
    add_trial(parent, 1, {24: 0.9}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {24: 0.8}, outcome="completed")
    winner = read_search(client, experiment).winner()
    assert winner is not None
    assert winner.number == 2


def test_winner_is_the_best_control_where_no_search_trial_was_completed(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    parent = launch(f"search of {experiment}")
    add_trial(parent, 1, {24: 0.7}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {24: 0.9}, outcome="completed", arm="control", control="last")
    add_trial(parent, 3, {8: 0.95}, outcome="pruned")
    winner = read_search(client, experiment).winner()
    assert winner is not None
    assert winner.number == 2


def test_row_holds_what_the_run_holds(client: MlflowClient, searched: str) -> None:
    row = read_search(client, searched).trial(1)
    assert (row.arm, row.control, row.outcome, row.error) == ("control", "kd_only", "completed", "")
    assert (row.epochs, row.metrics) == (24, {"val_accuracy": 0.7})
    assert row.parameters == {"loss.hint": "at", "weight.hint": "1"}
    assert client.get_run(row.run_id).data.tags["trial"] == "1"


def test_run_without_outcome_is_running(client: MlflowClient, searched: str) -> None:
    row = read_search(client, searched).trial(7)
    assert (row.outcome, row.epochs) == ("running", 3)


def test_failed_trial_says_why(client: MlflowClient, searched: str) -> None:
    row = read_search(client, searched).trial(5)
    assert (row.outcome, row.error, row.epochs, row.metrics) == ("failed", "it broke", 0, {})


def test_unknown_trial_says_what_there_is(client: MlflowClient, searched: str) -> None:
    with pytest.raises(InputError, match=r"has no trial 8; choose 1\.\.7$"):
        read_search(client, searched).trial(8)


def test_frame_has_a_row_a_trial_in_order(client: MlflowClient, searched: str) -> None:
    record = read_search(client, searched)
    frame = record.frame()
    assert frame["trial"].tolist() == order(record)
    assert frame.loc[0, ["arm", "epochs", "val_accuracy", "weight.hint"]].tolist() == ["search", 24, 0.9, "3"]


def test_name_of_a_study_means_its_latest_search(
    client: MlflowClient, experiment: str, launch: Callable[..., str]
) -> None:
    for search in ("earlier", "latest"):
        launch(f"{search} of {experiment}")
    assert read_search(client, experiment).name == f"latest of {experiment}"


def test_name_of_a_search_means_that_one(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    earlier = launch(f"earlier of {experiment}")
    add_trial(launch(f"latest of {experiment}"), 1, {})
    record = read_search(client, f"earlier of {experiment}")
    assert (record.parent_run_id, record.trials) == (earlier, ())


def test_tags_of_the_parent_are_kept(client: MlflowClient, experiment: str, launch: Callable[..., str]) -> None:
    launch(f"search of {experiment}", **{"teacher.sha256": "abc"})
    assert read_search(client, experiment).tags["teacher.sha256"] == "abc"


def test_unknown_search_names_the_nearest(client: MlflowClient, experiment: str, launch: Callable[..., str]) -> None:
    launch(f"{experiment}-20260101-120000")
    with pytest.raises(InputError) as caught:
        read_search(client, f"{experiment}-20260101-120001")
    message = str(caught.value)
    assert message.startswith(f"the tracking store has no search '{experiment}-20260101-120001'; did you mean ")
    assert f"'{experiment}-20260101-120000'?" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["it's", "%", 'a "quoted" name', ""])
def test_strange_name_is_an_unknown_search(client: MlflowClient, experiment: str, name: str) -> None:
    with pytest.raises(InputError, match=r"^the tracking store has no search"):
        read_search(client, name)
