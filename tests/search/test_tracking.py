import json
from itertools import count
from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.tracking import PARENT_TAG, EpochMetrics, TrackedSearch, connect
from mlflow.tracking import MlflowClient

numbers = count(1)


@pytest.fixture
def experiment() -> str:
    return f"tracking-{next(numbers)}"


@pytest.fixture
def tracked(client: MlflowClient, experiment: str) -> TrackedSearch:
    return TrackedSearch(client, experiment, f"search of {experiment}", None)


def test_trap_13_reading_a_missing_store_raises_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        connect(f"sqlite:///{tmp_path}/there/mlflow.db", create=False)
    assert str(caught.value) == (
        f"there is no tracking store {tmp_path}/there/mlflow.db; run a search first, or name the store by --tracking"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [True, False])
def test_trap_16_file_store_is_refused_in_one_line(tmp_path: Path, create: bool) -> None:
    with pytest.raises(InputError) as caught:
        connect(f"file://{tmp_path}/mlruns", create)
    message = str(caught.value)
    assert message.startswith(f"the tracking store file://{tmp_path}/mlruns does not answer (")
    assert message.endswith("); start it or name another")
    assert "\n" not in message


def test_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(InputError) as caught:
        connect(f"sqlite:///{tmp_path}/mlflow.db", create=False)
    assert str(caught.value).startswith(f"the tracking store sqlite:///{tmp_path}/mlflow.db does not answer (")
    assert "\n" not in str(caught.value)


def test_server_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError) as caught:
        connect("http://127.0.0.1:9", create=True)  # the discard port: nothing listens
    assert str(caught.value).startswith("the tracking store http://127.0.0.1:9 does not answer (")
    assert "\n" not in str(caught.value)


def test_experiment_is_the_study_and_the_parent_run_the_search(
    client: MlflowClient, tracked: TrackedSearch, experiment: str
) -> None:
    parent = client.get_run(tracked.parent_run_id)
    assert client.get_experiment(parent.info.experiment_id).name == experiment
    assert parent.info.run_name == parent.data.tags["search"] == f"search of {experiment}"


def test_artifacts_lie_beside_the_sqlite_file_wherever_one_is(
    client: MlflowClient, tracked: TrackedSearch, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(client.tracking_uri.removeprefix("sqlite:///")).parent
    run = client.get_run(tracked.parent_run_id)
    assert run.info.artifact_uri.startswith((folder / "mlartifacts" / experiment).as_uri())


def test_parent_run_of_a_search_is_found_again(client: MlflowClient, tracked: TrackedSearch, experiment: str) -> None:
    again = TrackedSearch(client, experiment, tracked.name, None)
    assert again.parent_run_id == tracked.parent_run_id


def test_searches_of_a_study_have_parent_runs_of_their_own(
    client: MlflowClient, tracked: TrackedSearch, experiment: str
) -> None:
    assert TrackedSearch(client, experiment, "another", None).parent_run_id != tracked.parent_run_id


def test_documents_of_the_parent_run_can_be_downloaded(
    client: MlflowClient, tracked: TrackedSearch, tmp_path: Path
) -> None:
    file = tmp_path / "distances.npz"
    file.write_bytes(b"arrays")
    tracked.add_documents({"study.yaml": "name: digits\n", "search.json": {"a": [1, 2]}})
    tracked.add_file(file, "layers")
    read = {
        path: Path(client.download_artifacts(tracked.parent_run_id, path)).read_bytes()
        for path in ("study.yaml", "search.json", "layers/distances.npz")
    }
    assert read["study.yaml"] == b"name: digits\n"
    assert json.loads(read["search.json"]) == {"a": [1, 2]}
    assert read["layers/distances.npz"] == b"arrays"


def test_tags_of_the_parent_are_set(client: MlflowClient, tracked: TrackedSearch) -> None:
    tracked.tag_parent({"objective": "val_accuracy", "direction": "maximize"})
    assert client.get_run(tracked.parent_run_id).data.tags["objective"] == "val_accuracy"


def test_trial_is_found_by_its_number(tracked: TrackedSearch) -> None:
    first, second = (tracked.create_trial(number, {}) for number in (1, 11))
    assert (tracked.find_trial(1), tracked.find_trial(11), tracked.find_trial(2)) == (first, second, None)


def test_trial_of_another_search_is_not_found(client: MlflowClient, tracked: TrackedSearch, experiment: str) -> None:
    tracked.create_trial(1, {})
    assert TrackedSearch(client, experiment, "another", None).find_trial(1) is None


def test_trial_is_a_child_run_with_its_tags(client: MlflowClient, tracked: TrackedSearch) -> None:
    run = client.get_run(tracked.create_trial(7, {"arm": "search"}))
    assert run.data.tags[PARENT_TAG] == tracked.parent_run_id
    assert (run.data.tags["trial"], run.data.tags["arm"], run.info.run_name) == ("7", "search", "trial-007")


def test_parameters_may_be_logged_twice(client: MlflowClient, tracked: TrackedSearch) -> None:
    run_id = tracked.create_trial(1, {})
    for _ in range(2):
        tracked.log_params(run_id, {"lr": 0.1, "loss.hint": "at"})
    assert client.get_run(run_id).data.params == {"lr": "0.1", "loss.hint": "at"}


def test_epochs_that_have_the_metric_are_known(tracked: TrackedSearch) -> None:
    run_id = tracked.create_trial(1, {})
    epochs = [(1, {"val_accuracy": 0.1}), (8, {"val_accuracy": 0.2}), (9, {"train_loss": 0.2})]
    tracked.log_epochs(run_id, [EpochMetrics(epoch, metrics, 0) for epoch, metrics in epochs])
    assert tracked.logged_epochs(run_id, "val_accuracy") == {1, 8}


def test_more_epochs_than_a_request_may_hold_all_arrive(client: MlflowClient, tracked: TrackedSearch) -> None:
    run_id = tracked.create_trial(1, {})
    metrics = {f"loss_{i}": 0.5 for i in range(300)}
    # MLflow refuses more than 1,000 figures at once.
    tracked.log_epochs(run_id, [EpochMetrics(epoch, metrics, 0) for epoch in range(1, 8)])
    assert {entry.step for entry in client.get_metric_history(run_id, "loss_299")} == set(range(1, 8))
    assert tracked.logged_epochs(run_id, "loss_0") == set(range(1, 8))


@pytest.mark.parametrize(("status", "closed"), [("FINISHED", True), ("FAILED", True), ("KILLED", False)])
def test_run_is_closed_for_good_unless_it_was_interrupted(
    client: MlflowClient, tracked: TrackedSearch, status: str, closed: bool
) -> None:
    run_id = tracked.create_trial(1, {})
    tracked.close(run_id, status, {"outcome": "as it was"})
    assert tracked.is_closed(run_id) is closed
    assert client.get_run(run_id).info.status == status
    assert client.get_run(run_id).data.tags["outcome"] == "as it was"


def test_interrupted_run_is_opened_again(client: MlflowClient, tracked: TrackedSearch) -> None:
    run_id = tracked.create_trial(1, {})
    tracked.close(run_id, "KILLED", {})
    tracked.set_running(run_id)
    assert client.get_run(run_id).info.status == "RUNNING"
