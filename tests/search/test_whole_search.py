"""One search with all methods at once, as a user runs it: own loss, combination, warm-up, dynamic weights, rankings."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hintsearch.distill.losses import HINT_LOSSES, LOGIT_LOSSES
from hintsearch.search.command_line import next_commands
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from processes import TINY_STUDY, CommandLine, Ended, call, journal_events

OWN_LOSS = """
def my_loss(student, teacher):
    sizes = [feature.square().mean(dim=(1, 2, 3)) for feature in (student, teacher)]
    return (sizes[0] - sizes[1]).square()
"""
STUDY: dict[str, Any] = {
    **TINY_STUDY,
    "name": "methods",
    "layers": {"chunk": 100, "actors": 1},
    "space": {
        "hints": {"clusters": 2},
        # The first is the controls'; by this seed the search suggests the other.
        "loss": {"hint": ["at+sp", "my_losses.py:my_loss"]},
        "weight": {
            "hint": {"low": 0.1, "high": 1},
            "by_loss": {"sp": {"low": 1, "high": 2}},
            "logit": 0.5,
            "classification": 0,
        },
    },
    "objective": {"metric": "val_map_cosine"},
    "warmup": "indistill",
    "dynamic_weights": {"meta_images": 40, "meta_batch_size": 20, "warmup_fraction": 0},
    "controls": {"arms": ["no_distillation", "stage_ends"], "trials": 2},
    # Nearly all go on: what is looked at is a whole trial.
    "budget": {"trials": 1, "rungs": [1, 2], "reduction": 1.01, "checkpoint_seconds": 0},
}
RUNGS = [1, 2]
NO_DISTILLATION, COMBINATION, OWN = 1, 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("methods")
    (place / "my_losses.py").write_text(OWN_LOSS)
    (place / "methods.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return place


@pytest.fixture(scope="module")
def searched(folder: Path, shared_cache: Path) -> Ended:
    return CommandLine(shared_cache).run(["search", "methods.yaml", "--name", "all", "--json"], folder)


@pytest.fixture(scope="module")
def runs(folder: Path, searched: Ended) -> dict[int, Run]:
    """The trials' runs by number, and the parent's as 0."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("methods")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {int(run.data.tags.get("trial", 0)): run for run in found}


def steps(folder: Path, run: Run, metric: str) -> list[int]:
    history = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_metric_history(run.info.run_id, metric)
    return [entry.step for entry in history]


def test_search_completes(searched: Ended, folder: Path) -> None:
    assert searched.code == 0, searched.err
    trials = {trial["number"]: trial for trial in searched.document()["trials"]}
    assert {number: (trial["arm"], trial["outcome"]) for number, trial in trials.items()} == {
        NO_DISTILLATION: ("control", "completed"),
        COMBINATION: ("control", "completed"),
        OWN: ("search", "completed"),
    }
    losses = [trials[number]["parameters"].get("loss.hint") for number in (NO_DISTILLATION, COMBINATION, OWN)]
    assert losses == [None, "at+sp", f"{folder}/my_losses.py:my_loss"]


def test_objective_is_logged_at_the_ends_of_rungs_alone(folder: Path, runs: dict[int, Run]) -> None:
    for number in (NO_DISTILLATION, COMBINATION, OWN):
        assert steps(folder, runs[number], "val_map_cosine") == RUNGS
    for event in journal_events(folder / "results" / "all", "report"):
        assert ("val_map_cosine" in event["metrics"]) == (event["epoch"] in RUNGS)


def test_trials_with_hint_points_show_their_warmup_once(folder: Path, runs: dict[int, Run]) -> None:
    for number, points in ((COMBINATION, 3), (OWN, 2)):
        assert len(runs[number].data.params["hints.points"].split(",")) == points
        logged = {metric for metric in runs[number].data.metrics if metric.startswith("warmup")}
        assert logged == {"warmup_seconds", *(f"warmup_loss_{depth}" for depth in range(1, points + 1))}
        assert steps(folder, runs[number], "warmup_loss_1") == [1]
    assert not [metric for metric in runs[NO_DISTILLATION].data.metrics if metric.startswith("warmup")]


def test_weights_of_all_terms_are_logged(runs: dict[int, Run]) -> None:
    for number, losses in ((COMBINATION, ("at", "sp")), (OWN, ("my_loss",))):
        data = runs[number].data
        points = data.params["hints.points"].split(",")
        terms = {"hint_weight.logit", *(f"hint_weight.{loss}.{point}" for loss in losses for point in points)}
        logged = {name: value for name, value in data.metrics.items() if name.startswith("hint_weight")}
        assert set(logged) == terms
        assert sum(logged.values()) == pytest.approx(len(terms), rel=1e-4)
        assert set(logged.values()) != {1.0}


def test_runs_say_whether_their_weights_are_dynamic(runs: dict[int, Run]) -> None:
    tags = {number: runs[number].data.tags["hint_weights"] for number in (NO_DISTILLATION, COMBINATION, OWN)}
    assert tags == {NO_DISTILLATION: "fixed", COMBINATION: "dynamic", OWN: "dynamic"}


def test_control_without_teacher_learns_labels(runs: dict[int, Run]) -> None:
    weights = [runs[number].data.params["weight.classification"] for number in (NO_DISTILLATION, COMBINATION, OWN)]
    assert weights == ["1.0", "0.0", "0.0"]


def test_weight_of_a_loss_comes_from_its_own_range(runs: dict[int, Run]) -> None:
    params = runs[COMBINATION].data.params
    assert (float(params["weight.hint"]), float(params["weight.hint.2"])) == pytest.approx((0.1**0.5, 2**0.5))
    assert 0.1 <= float(runs[OWN].data.params["weight.hint"]) <= 1


def test_own_loss_is_said_and_recorded(folder: Path, searched: Ended, runs: dict[int, Run]) -> None:
    path, sha256 = folder / "my_losses.py", hashlib.sha256(OWN_LOSS.encode()).hexdigest()
    assert f"Loss my_loss by your own code: {path} (sha256 {sha256[:12]})." in searched.err
    assert runs[0].data.tags["code.loss my_loss"] == f"{path} sha256:{sha256}"


def export(folder: Path, cache: Path, number: int) -> Path:
    output = folder / f"trial-{number}.yaml"
    ended = call(["export", "all", "--trial", str(number), "-o", output.name, "--json"], folder, cache)
    assert ended.code == 0, ended.err
    return output


@pytest.mark.parametrize("number", [COMBINATION, OWN])
def test_exported_trial_is_retrained_to_the_very_figure(
    folder: Path, searched: Ended, shared_cache: Path, number: int
) -> None:
    hints = export(folder, shared_cache, number)
    exported = yaml.safe_load(hints.read_text())
    arguments = ["distill", hints.name, "-o", f"{hints.stem}.safetensors", "--json"]
    ended = call([*arguments, *(["--trust-code"] if number == OWN else [])], folder, shared_cache)
    assert ended.code == 0, ended.err
    (student,) = ended.document()["students"]
    assert student["validation"]["val_map_cosine"] == exported["evidence"]["value"]
    assert 0 < student["test"]["map_cosine"] <= 1
    assert "exactly the exported figure" in ended.err
    assert f"{student['test']['map_cosine']:.4f}" in ended.err


def test_own_loss_of_an_export_does_not_run_unasked(folder: Path, searched: Ended, shared_cache: Path) -> None:
    hints = export(folder, shared_cache, OWN)
    ended = call(["distill", hints.name], folder, shared_cache)
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert line.startswith(f"error: the hint file names the code {folder}/my_losses.py:my_loss (loss; ")
    assert line.endswith("add --trust-code to run it")


def test_command_that_is_proposed_after_the_search_retrains_its_winner(searched: Ended) -> None:
    (proposed,) = [line for line in searched.err.splitlines() if "distill results/all/hints.yaml" in line]
    assert proposed.endswith("distill results/all/hints.yaml --seeds 3")


def test_command_that_is_proposed_trusts_the_own_loss_of_an_export(
    folder: Path, searched: Ended, shared_cache: Path
) -> None:
    hints = str(export(folder, shared_cache, OWN))
    commands = [command for command, _ in next_commands("all", hints, "sqlite:////elsewhere/mlflow.db")]
    assert commands == [
        "compare all --tracking sqlite:////elsewhere/mlflow.db",
        f"distill {hints} --seeds 3 --trust-code",
        "ui --tracking sqlite:////elsewhere/mlflow.db",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("space.loss.hint=[at+sq]", "space.loss.hint.0: unknown hint loss 'sq'; did you mean 'sp'?"),
        ("space.loss.hint=[my_losses.py:my loss]", "'my loss' is not a function's name; write path/to/"),
        ("warmup=indistil", "warmup.method is \"indistil\", but input should be 'indistill'"),
        ("dynamic_weights.meta_images=10", "dynamic_weights.meta_images is 10, but must be at least meta_batch"),
        ("objective.metric=val_accuracy", "space.weight.classification may be 0, but val_accuracy needs a trained"),
    ],
)
def test_mistake_is_one_line_and_exit_2(folder: Path, tmp_path: Path, change: str, said: str) -> None:
    before = sorted(path.name for path in folder.iterdir())
    ended = call(["search", "methods.yaml", "--name", "wrong", "--set", change], folder, tmp_path / "cache")
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert said in line
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "arguments", [["search", "--losses", "at"], ["distill", "h.yaml", "--trust"], ["losses", "--a"]]
)
def test_wrong_flag_is_exit_2_and_named(folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    flag = next(argument for argument in arguments if argument.startswith("--"))
    ended = call(arguments, folder, tmp_path)
    assert ended.code == 2
    assert f"No such option: {flag}" in ended.err


def test_losses_lists_every_loss_with_what_it_needs_and_its_source(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in call(["losses", "--json"], tmp_path, tmp_path).document()}
    entries = {entry.name: entry for entry in (*LOGIT_LOSSES, *HINT_LOSSES)}
    assert set(rows) == set(entries)
    assert {"at", "crd", "fsp", "reviewkd", "strongest_channels", "pkt_symmetric", "wsl"} <= set(rows)
    for name, row in rows.items():
        assert row["source"] == entries[name].source
        assert row["kind"]
        assert row["needs"]
        assert row["source"]


def test_table_of_losses_shows_all_that_they_declare(tmp_path: Path) -> None:
    rows = call(["losses", "--json"], tmp_path, tmp_path).document()
    shown = call(["losses"], tmp_path, tmp_path).out
    cells = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    columns = ["".join(cell.strip().replace(" ", "") for cell in column) for column in zip(*cells, strict=True)]
    for row in rows:
        for value in row.values():
            assert any(value.replace(" ", "") in column for column in columns), value
