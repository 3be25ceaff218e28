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
def add_repeat(client: MlflowClient, add_trial: Callable[..., str]) -> Callable[..., str]:
    """Makes the run of a confirm trial; its last value is that of epoch 24."""

    def make(parent: str, number: int, confirms: int, seeds: tuple[int, int], value: float, **tags: str) -> str:
        tags = {"arm": "confirm", "confirms": str(confirms), "outcome": "completed", **tags}
        run_id = add_trial(parent, number, {24: value}, **tags)
        client.log_batch(run_id, params=[Param("data_seed", str(seeds[0])), Param("init_seed", str(seeds[1]))])
        return run_id

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


@pytest.mark.parametrize(("control", "searched", "number"), [(0.9, 0.8, 1), (0.8, 0.9, 2), (0.8, 0.8, 2)])
def test_winner_without_confirming_is_the_better_of_search_and_controls(
    client: MlflowClient,
    experiment: str,
    launch: Callable[..., str],
    add_trial: Callable[..., str],
    control: float,
    searched: float,
    number: int,
) -> None:
    parent = launch(f"search of {experiment}")
    add_trial(parent, 1, {24: control}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {24: searched}, outcome="completed")
    winner = read_search(client, experiment).winner()
    assert winner is not None
    assert winner.number == number


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


@pytest.fixture
def confirmed(
    client: MlflowClient,
    experiment: str,
    launch: Callable[..., str],
    add_trial: Callable[..., str],
    add_repeat: Callable[..., str],
) -> SearchRecord:
    """A search whose best trial, 3, was lucky: with fresh seeds the control 1 is better, and 2 is in between."""
    parent = launch(f"search of {experiment}", objective="val_accuracy", direction="maximize")
    add_trial(parent, 1, {24: 0.7}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {24: 0.8}, outcome="completed")
    add_trial(parent, 3, {24: 0.9}, outcome="completed")
    number = 4
    for seeds, values in {(1, 2): (0.75, 0.70, 0.66), (3, 4): (0.79, 0.71, 0.65), (5, 6): (0.76, 0.72, 0.67)}.items():
        for confirms, value in enumerate(values, start=1):
            control = {"control": "kd_only"} if confirms == 1 else {}
            add_repeat(parent, number, confirms, seeds, value, **control)
            number += 1
    return read_search(client, experiment)


def test_repeats_are_summed_up_by_what_they_confirm(confirmed: SearchRecord) -> None:
    found = confirmed.confirmation()
    assert found is not None
    # Means and standard deviations by hand.
    assert [(s.number, s.arm, s.control, s.n) for s in found.summaries] == [
        (1, "control", "kd_only", 3),
        (2, "search", "", 3),
        (3, "search", "", 3),
    ]
    assert [s.mean for s in found.summaries] == pytest.approx([2.30 / 3, 0.71, 0.66])
    assert [s.sd for s in found.summaries] == pytest.approx([(0.00086666666 / 2) ** 0.5, 0.01, 0.01], rel=1e-5)


def test_repeats_are_compared_seed_by_seed_whatever_their_order(confirmed: SearchRecord) -> None:
    found = confirmed.confirmation()
    assert found is not None
    assert found.comparison is not None
    # The search's best of the search phase, not that of the repeats.
    assert (found.comparison.winner, found.comparison.control, found.comparison.n) == (3, 1, 3)
    assert found.comparison.differences == pytest.approx((-0.09, -0.14, -0.09))


def test_control_that_holds_better_is_the_winner(confirmed: SearchRecord) -> None:
    winner = confirmed.winner()
    assert winner is not None
    assert (winner.number, winner.arm) == (1, "control")


def test_repeat_that_failed_leaves_its_seeds_out(
    client: MlflowClient,
    experiment: str,
    launch: Callable[..., str],
    add_trial: Callable[..., str],
    add_repeat: Callable[..., str],
) -> None:
    parent = launch(f"search of {experiment}")
    add_trial(parent, 1, {24: 0.7}, outcome="completed", arm="control", control="kd_only")
    add_trial(parent, 2, {24: 0.8}, outcome="completed")
    for number, (confirms, seed, outcome) in enumerate(
        [(2, 1, "completed"), (1, 1, "completed"), (2, 2, "failed"), (1, 2, "completed")], start=3
    ):
        add_repeat(parent, number, confirms, (seed, seed), 0.5, outcome=outcome)
    found = read_search(client, experiment).confirmation()
    assert found is not None
    assert found.comparison is not None
    assert {s.number: s.n for s in found.summaries} == {1: 2, 2: 1}
    assert (found.comparison.n, found.comparison.left_out) == (1, 1)


def test_search_without_repeats_has_no_confirmation(client: MlflowClient, searched: str) -> None:
    assert read_search(client, searched).confirmation() is None


def test_arms_have_the_trials_and_epochs_that_they_were_given(client: MlflowClient, searched: str) -> None:
    arms = read_search(client, searched).arms()
    # 24 + 24 completed, 8 + 8 pruned, 0 failed at once, 3 so far.
    assert [(arm.arm, arm.control, arm.trials, arm.epochs) for arm in arms] == [
        ("control", "kd_only", 1, 24),
        ("search", "", 6, 24 + 24 + 8 + 8 + 0 + 3),
    ]
    assert [arm.best.number if arm.best else None for arm in arms] == [1, 3]


def test_arm_without_a_completed_trial_has_no_best(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    parent = launch(f"search of {experiment}")
    add_trial(parent, 1, {8: 0.7}, outcome="failed", arm="control", control="last")
    (arm,) = read_search(client, experiment).arms()
    assert (arm.control, arm.trials, arm.epochs, arm.best) == ("last", 1, 8, None)


def test_repeats_of_a_control_are_an_arm_of_their_own(confirmed: SearchRecord) -> None:
    found = {(arm.arm, arm.control): (arm.trials, arm.epochs) for arm in confirmed.arms()}
    assert found == {
        ("control", "kd_only"): (1, 24),
        ("search", ""): (2, 48),
        ("confirm", "kd_only"): (3, 72),
        ("confirm", ""): (6, 144),
    }


def test_pareto_set_is_of_completed_search_trials(
    client: MlflowClient, experiment: str, launch: Callable[..., str], add_trial: Callable[..., str]
) -> None:
    parent = launch(f"search of {experiment}", objective="val_accuracy", against="training_seconds")
    trials: list[tuple[float, float, dict[str, str]]] = [
        # Better than all, but a control.
        (0.99, 1.0, {"arm": "control", "control": "kd_only", "outcome": "completed"}),
        (0.90, 40.0, {"outcome": "completed"}),
        (0.85, 20.0, {"outcome": "completed"}),
        # Slower than the last and no better.
        (0.84, 25.0, {"outcome": "completed"}),
        (0.70, 10.0, {"outcome": "completed"}),
        # Never got to its end.
        (0.95, 5.0, {"outcome": "failed"}),
    ]
    for number, (accuracy, seconds, tags) in enumerate(trials, start=1):
        run_id = add_trial(parent, number, {24: accuracy}, **tags)
        client.log_metric(run_id, "training_seconds", seconds, step=24)
    found = read_search(client, experiment).pareto()
    assert found is not None
    assert found.members == (2, 3, 5)
    # By hand: 3 has 75 % of the gain in accuracy for 33 % of the time.
    assert found.knee == 3


def test_search_that_weighs_no_cost_has_no_pareto_set(client: MlflowClient, searched: str) -> None:
    assert read_search(client, searched).pareto() is None


@pytest.mark.parametrize("name", ["it's", "%", 'a "quoted" name', ""])
def test_strange_name_is_an_unknown_search(client: MlflowClient, experiment: str, name: str) -> None:
    with pytest.raises(InputError, match=r"^the tracking store has no search"):
        read_search(client, name)
