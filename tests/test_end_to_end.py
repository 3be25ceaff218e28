"""The main job as a user does it: processes, real Ray, Tune, Optuna, MLflow and sqlite."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from processes import (
    TINY_STUDY,
    CommandLine,
    Ended,
    call,
    experiment_id,
    journal_events,
    users_project,
)
from safetensors.torch import load_file

PLANNED = 5
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory, tiny_study_text: str) -> Path:
    """A user's project that has packages and modules of our folders' names."""
    return users_project(tmp_path_factory.mktemp("user"), tiny_study_text)


@pytest.fixture(scope="module")
def searched(users_folder: Path, shared_cache: Path) -> tuple[CommandLine, Ended]:
    """The tiny study, searched by `python -m hintsearch` from the user's folder."""
    command_line = CommandLine(shared_cache)
    return command_line, command_line.run(["search", "tiny.yaml", "--name", "first", "--json"], users_folder)


@pytest.fixture(scope="module")
def client(users_folder: Path, searched: tuple[CommandLine, Ended]) -> MlflowClient:
    """On the store that the search made."""
    return MlflowClient(f"sqlite:///{users_folder / 'mlflow.db'}")


def test_trap_30_a_search_works_from_a_folder_with_models_search_and_analysis(
    searched: tuple[CommandLine, Ended],
) -> None:
    ended = searched[1]
    assert ended.code == 0, ended.err
    document = ended.document()
    assert document["search"] == "first"
    assert sorted(trial["number"] for trial in document["trials"]) == list(range(1, PLANNED + 1))


def test_no_process_is_left_behind(searched: tuple[CommandLine, Ended]) -> None:
    assert searched[0].wait_until_gone(5) == []


def test_only_the_results_and_the_tracking_store_are_left(users_folder: Path, searched: object) -> None:
    made = {path.name for path in users_folder.iterdir()} - {"models", "search", "distill", "analysis.py", "tiny.yaml"}
    assert made == {"results", "mlflow.db", "mlartifacts"}
    assert {"journal.jsonl", "optuna.db", "distances.npz", "hints.yaml", "figures", "tune"} == {
        path.name for path in (users_folder / "results" / "first").iterdir()
    }


def test_the_parent_run_holds_what_the_search_stands_on(client: MlflowClient) -> None:
    (parent,) = client.search_runs([experiment_id(client)], "tags.search = 'first'")
    assert parent.info.run_name == "first"
    assert parent.info.status == "FINISHED"
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    documents = {"study.yaml", "space.json", "search.json", "importances.json", "hints.yaml"}
    assert artifacts == documents | {"layers", "teacher", "figures"}
    logged = yaml.safe_load(Path(client.download_artifacts(parent.info.run_id, "study.yaml")).read_text())
    assert logged["budget"]["rungs"] == TINY_STUDY["budget"]["rungs"]


def test_the_parent_run_shows_the_layers_and_the_winners_hint_points(client: MlflowClient) -> None:
    (parent,) = client.search_runs([experiment_id(client)], "tags.search = 'first'")
    pictures = [item.path for item in client.list_artifacts(parent.info.run_id, "figures")]
    assert {"figures/layer-distances.png", "figures/layer-scores.png", "figures/hint-scores.png"} <= set(pictures)
    for picture in pictures:
        assert Path(client.download_artifacts(parent.info.run_id, picture)).read_bytes().startswith(PNG)


def test_trap_14_every_trial_is_one_closed_run_below_the_parent(client: MlflowClient) -> None:
    (parent,) = client.search_runs([experiment_id(client)], "tags.search = 'first'")
    children = client.search_runs([experiment_id(client)], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(int(run.data.tags["trial"]) for run in children) == list(range(1, PLANNED + 1))
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["outcome"] in ("completed", "pruned")
        assert run.data.tags["arm"] == ("control" if int(run.data.tags["trial"]) <= 2 else "search")
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [entry.step for entry in history] == list(range(1, int(run.data.metrics["epoch"]) + 1))


def test_a_search_trial_shows_its_parameters_and_curves(client: MlflowClient) -> None:
    runs = client.search_runs([experiment_id(client)], "tags.arm = 'search' and tags.outcome = 'completed'")
    params, metrics = runs[0].data.params, runs[0].data.metrics
    expected = {"hints.clusters", "hints.metrics", "hints.selector", "hints.points", "loss.hint", "weight.hint"}
    assert expected | {"weight.logit", "weight.classification", "lr"} <= set(params)
    assert len(params["hints.points"].split(",")) == int(params["hints.clusters"])
    assert {"val_accuracy", "val_loss", "train_loss", "loss_hint", "images_per_second", "normaliser_1"} <= set(metrics)


def test_control_arms_have_the_hints_that_their_names_say(client: MlflowClient) -> None:
    runs = client.search_runs([experiment_id(client)], "tags.arm = 'control'")
    params = {run.data.tags["control"]: run.data.params for run in runs}
    assert params["no_distillation"]["weight.hint"] == "0.0"
    assert "hints.points" not in params["no_distillation"]
    assert params["reversed"]["hints.pairs"] == "layer1.0→layer3.0,layer2.0→layer2.0,layer3.0→layer1.0"


def test_compare_prints_every_trial_as_json(
    users_folder: Path, searched: tuple[CommandLine, Ended], shared_cache: Path
) -> None:
    compared = call(["compare", "tiny", "--json"], users_folder, shared_cache).document()
    assert compared["search"] == "first"
    assert compared["trials"] == searched[1].document()["trials"]


@pytest.fixture(scope="module")
def retrained(
    users_folder: Path, searched: tuple[CommandLine, Ended], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """`distill` in another folder with an empty cache: only the tracking store has the teacher."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(users_folder / "results" / "first" / "hints.yaml", elsewhere / "hints.yaml")
    moved = tmp_path_factory.mktemp("moved") / "cache"
    shutil.move(_teachers(searched[0]), moved)
    try:
        command_line = CommandLine(elsewhere / "cache")
        return elsewhere, command_line.run(["distill", "hints.yaml", "--json", "-o", "s.safetensors"], elsewhere)
    finally:
        shutil.move(moved, _teachers(searched[0]))


def _teachers(command_line: CommandLine) -> Path:
    return Path(command_line.environment["HINTSEARCH_CACHE"]) / "teachers"


def test_distill_reproduces_the_exported_figure_with_only_the_tracking_store(
    users_folder: Path, retrained: tuple[Path, Ended]
) -> None:
    elsewhere, ended = retrained
    assert ended.code == 0, ended.err
    (student,) = ended.document()["students"]
    exported = yaml.safe_load((elsewhere / "hints.yaml").read_text())
    # Exactly: same seeds, same threads, same machine.
    assert student["validation"]["val_accuracy"] == exported["evidence"]["value"]
    assert 0 <= student["test_accuracy"] <= 1


def test_distill_writes_the_student_alone(retrained: tuple[Path, Ended]) -> None:
    weights = load_file(retrained[0] / "s.safetensors")
    assert weights["conv1.weight"].shape == torch.Size([4, 1, 3, 3])
    assert not any("teacher" in name or "regressor" in name for name in weights)


def test_distill_pairs_another_student_anew(users_folder: Path, searched: object, shared_cache: Path) -> None:
    arguments = ["distill", "results/first/hints.yaml", "--student", "resnet14", "--seeds", "2", "-o", "o.safetensors"]
    ended = call([*arguments, "--json"], users_folder, shared_cache)
    assert ended.code == 0, ended.err
    students = ended.document()["students"]
    assert [(s["data_seed"], s["init_seed"]) for s in students] == [(3, 3), (3, 4)]
    for name in ("o-seed0.safetensors", "o-seed1.safetensors"):
        (users_folder / name).unlink()


def test_distill_without_the_teacher_anywhere_is_one_line_and_exit_2(
    users_folder: Path, searched: tuple[CommandLine, Ended], shared_cache: Path, tmp_path: Path
) -> None:
    from hintsearch.search.export import HintFile, checksum, load_hints, write_hints

    # Not the winner, which may be a control that no teacher teaches.
    rows = searched[1].document()["trials"]
    number = next(row["number"] for row in rows if row["arm"] == "search" and row["outcome"] == "completed")
    call(
        ["export", "first", "--trial", str(number), "-o", str(tmp_path / "of_search.yaml")], users_folder, shared_cache
    )
    found = load_hints(tmp_path / "of_search.yaml")
    teacher = found.teacher.model_copy(
        update={"path": str(tmp_path / "gone.safetensors"), "tracking_uri": f"sqlite:///{tmp_path / 'gone.db'}"}
    )
    lost: HintFile = found.model_copy(update={"teacher": teacher})
    write_hints(tmp_path / "hints.yaml", lost.model_copy(update={"checksum": checksum(lost.model_dump(mode="json"))}))
    before = sorted(path.name for path in tmp_path.iterdir())
    ended = call(["distill", "hints.yaml"], tmp_path, tmp_path / "cache")
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert "give their file by --teacher PATH" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_layers_and_hints_answer_from_the_cache(users_folder: Path, searched: object, shared_cache: Path) -> None:
    layers = call(["layers", "tiny.yaml", "--json"], users_folder, shared_cache).document()
    assert [candidate["path"] for candidate in layers["candidates"]] == ["layer1.0", "layer2.0", "layer3.0"]
    assert set(layers["distances"]) == {"r2_cca", "cka_linear", "effective_rank", "class_separation"}
    arguments = ["hints", "tiny.yaml", "--clusters", "2", "--metrics", "cka_linear", "--selector", "kmedoids"]
    hints = call([*arguments, "--json"], users_folder, shared_cache).document()
    assert len(hints["points"]) == 2
    assert sorted(member for cluster in hints["clusters"] for member in cluster) == [1, 2, 3]
    assert [pair["teacher_layer"] for pair in hints["pairs"]] == hints["points"]
    assert -1 <= hints["silhouette"] <= 1
    assert hints["stability"] <= 1
    for picture in (*layers["figures"], *hints["figures"]):
        assert (users_folder / picture).read_bytes().startswith(PNG)


def test_hints_by_similarity_train_the_student_they_compare_with_once(
    users_folder: Path, searched: object, shared_cache: Path
) -> None:
    arguments = ["hints", "tiny.yaml", "--clusters", "auto", "--pairing", "by_similarity", "--json"]
    first = CommandLine(shared_cache).run(arguments, users_folder)
    assert first.code == 0, first.err
    (cached,) = (shared_cache / "similarity").iterdir()
    similarity = np.load(cached)
    assert similarity.shape == (3, 3)
    assert (similarity > 0).all()
    assert (similarity < 1).all()
    # From the cache alone: in this process, where Ray cannot be started.
    again = call(arguments, users_folder, shared_cache).document()
    assert again["pairs"] == first.document()["pairs"]
    assert again["pairing"] == "by_similarity"


def test_a_finished_search_is_extended_with_its_whole_history(
    users_folder: Path, searched: tuple[CommandLine, Ended]
) -> None:
    """Last of those that read the first search: it adds a trial to it."""
    before = journal_events(users_folder / "results" / "first")
    ended = searched[0].run(["search", "tiny.yaml", "--name", "first", "--extend", "1", "--json"], users_folder)
    assert ended.code == 0, ended.err
    added = journal_events(users_folder / "results" / "first")[len(before) :]
    assert [event["number"] for event in added if event["event"] == "suggestion"] == [PLANNED + 1]
    assert len(ended.document()["trials"]) == PLANNED + 1


def test_a_name_that_is_taken_is_refused(users_folder: Path, searched: object, shared_cache: Path) -> None:
    ended = call(["search", "tiny.yaml", "--name", "first"], users_folder, shared_cache)
    assert ended.code == 2
    assert "exists already" in ended.err


def test_a_name_that_the_store_has_is_refused(users_folder: Path, searched: object, shared_cache: Path) -> None:
    """Else the new search would take over the old one's runs, and show its results."""
    moved = users_folder / "results" / "moved"
    (users_folder / "results" / "first").rename(moved)
    try:
        ended = call(["search", "tiny.yaml", "--name", "first"], users_folder, shared_cache)
        assert not (users_folder / "results" / "first").exists()
    finally:
        moved.rename(users_folder / "results" / "first")
    assert ended.code == 2
    assert "the tracking store has a search 'first' already" in ended.err


def test_an_output_that_is_a_folder_is_refused_before_any_training(
    users_folder: Path, searched: object, shared_cache: Path
) -> None:
    for arguments in (["distill", "results/first/hints.yaml"], ["export", "tiny"]):
        ended = call([*arguments, "-o", "models"], users_folder, shared_cache)
        assert ended.code == 2
        assert "--output is models, but that is a folder" in ended.err


# Two controls and two trials of the search, then the best of each with three fresh seeds.
REPEATED = [
    "name=repeated",
    "budget={trials: 2, rungs: [1, 2]}",
    "confirm={configurations: 1, controls: 1, seeds: 3}",
    "objective.against=student_parameters",
    "space.student_width=[0.25, 0.5]",
    # Another range than the first search's, whose suggestion of the same number and seed would else be the same.
    "space.weight.hint={low: 0.005, high: 1}",
]


@pytest.fixture(scope="module")
def repeated(
    users_folder: Path,
    searched: tuple[CommandLine, Ended],
    shared_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict, Ended]:
    """A trial of the first search, and a search that begins with it, weighs a cost, and confirms what is best."""
    rows = searched[1].document()["trials"]
    best = next(row for row in rows if row["arm"] == "search" and row["outcome"] == "completed")
    point = tmp_path_factory.mktemp("point") / "hints.yaml"
    exported = call(["export", "first", "--trial", str(best["number"]), "-o", str(point)], users_folder, shared_cache)
    assert exported.code == 0, exported.err
    changes = [word for change in REPEATED for word in ("--set", change)]
    arguments = ["search", "tiny.yaml", "--name", "repeated", "--points", str(point), "--json", *changes]
    return best, CommandLine(shared_cache).run(arguments, users_folder)


def repeated_trials(repeated: tuple[dict, Ended]) -> dict[int, dict]:
    assert repeated[1].code == 0, repeated[1].err
    return {trial["number"]: trial for trial in repeated[1].document()["trials"]}


def test_trap_8_a_point_of_an_earlier_search_is_the_first_trial_of_the_search(repeated: tuple[dict, Ended]) -> None:
    trials = repeated_trials(repeated)
    names = ("hints.clusters", "hints.metrics", "hints.selector", "loss.hint", "weight.hint", "weight.logit")
    first, second = ({name: trials[number]["parameters"][name] for name in names} for number in (3, 4))
    assert first == {name: repeated[0]["parameters"][name] for name in names}
    assert second != first


def test_the_best_of_search_and_controls_are_repeated_with_the_same_fresh_seeds(repeated: tuple[dict, Ended]) -> None:
    repeats = [trial for trial in repeated_trials(repeated).values() if trial["arm"] == "confirm"]
    assert sorted(trial["number"] for trial in repeats) == list(range(5, 11))
    seeds: dict[int, set[tuple[str, str]]] = {}
    for trial in repeats:
        found = trial["parameters"]["data_seed"], trial["parameters"]["init_seed"]
        seeds.setdefault(trial["confirms"], set()).add(found)
    ours, theirs = seeds.values()
    assert {number > 2 for number in seeds} == {True, False}
    assert ours == theirs
    assert len(ours) == 3


def test_the_verdict_is_in_the_document_in_words_and_in_the_exported_file(
    users_folder: Path, repeated: tuple[dict, Ended]
) -> None:
    trials, ended = repeated_trials(repeated), repeated[1]
    confirmation = ended.document()["confirmation"]
    exported = yaml.safe_load((users_folder / "results" / "repeated" / "hints.yaml").read_text())
    assert exported["trial"] == confirmation["export"]
    evidence = exported["evidence"]["confirm"]
    assert evidence["test"]["said"] in ended.err
    # Recomputed from the trials.
    for summary in confirmation["summaries"]:
        values = [t["metrics"]["val_accuracy"] for t in trials.values() if t["confirms"] == summary["number"]]
        assert summary["mean"] == pytest.approx(np.mean(values))
        assert summary["sd"] == pytest.approx(np.std(values, ddof=1))


def test_a_search_against_a_cost_stops_nothing_and_exports_its_pareto_set(
    users_folder: Path, repeated: tuple[dict, Ended]
) -> None:
    trials, folder = repeated_trials(repeated), users_folder / "results" / "repeated" / "pareto"
    assert {trial["outcome"] for trial in trials.values()} == {"completed"}
    members = repeated[1].document()["pareto"]["members"]
    costs = {n: (-t["metrics"]["val_accuracy"], t["metrics"]["student_parameters"]) for n, t in trials.items()}
    searched = {n: costs[n] for n in (3, 4)}
    beaten = {
        n
        for n, cost in searched.items()
        for other in searched.values()
        if other != cost and other[0] <= cost[0] and other[1] <= cost[1]
    }
    assert set(members) == set(searched) - beaten
    assert {path.name for path in folder.iterdir()} == {"pareto.json", *(f"trial-{n}.yaml" for n in members)}
