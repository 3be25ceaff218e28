from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hintsearch.analysis.trials import SearchRecord
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.events import Event, Finished, Reported, Suggested
from hintsearch.search.export import HintFile, checksum, export_hints, load_hints, write_hints
from hintsearch.search.preparation import Preparation
from hintsearch.search.study import Study
from mlflow.tracking import MlflowClient
from recorded_search import recorded_search

NAME = "export-20260101-120000"
# Trial: control arm, accuracy at its end (None: it was pruned).
TRIALS = {1: ("kd_only", 0.7), 2: ("stage_ends", 0.8), 3: ("kd_only", 0.75), 4: ("", 0.9), 5: ("", 0.85), 6: ("", None)}


@pytest.fixture(scope="module")
def searched(
    client: MlflowClient,
    digits: Study,
    preparation: Preparation,
    suggested: Callable[..., Suggested],
    tmp_path_factory: pytest.TempPathFactory,
) -> SearchRecord:
    """A finished search, as read back from MLflow."""
    events: list[Event] = []
    for number, (control, accuracy) in TRIALS.items():
        normalisers = {f"normaliser_{i}": 0.1 * i for i in range(1, 6)}
        events += [suggested(number, control), Reported(number, 8, {"val_accuracy": 0.5, **normalisers}, None)]
        if accuracy is not None:
            events.append(Reported(number, 24, {"val_accuracy": accuracy}, None))
        events.append(Finished(number, "completed" if accuracy else "pruned", ""))
    return recorded_search(client, NAME, digits, preparation, tmp_path_factory.mktemp("search"), events)


@pytest.fixture(scope="module")
def exported(client: MlflowClient, searched: SearchRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported winner."""
    path = tmp_path_factory.mktemp("export") / "hints.yaml"
    export_hints(client, searched, path)
    return path


def test_exported_file_is_read_back_as_it_was_written(
    client: MlflowClient, searched: SearchRecord, tmp_path: Path
) -> None:
    written = export_hints(client, searched, tmp_path / "hints.yaml")
    assert load_hints(tmp_path / "hints.yaml") == written


def test_best_completed_search_trial_is_exported(exported: Path) -> None:
    hints = load_hints(exported)
    assert (hints.search, hints.trial, hints.arm) == (NAME, 4, "search")


def test_other_trial_is_exported_by_its_number(client: MlflowClient, searched: SearchRecord, tmp_path: Path) -> None:
    hints = export_hints(client, searched, tmp_path / "hints.yaml", trial=2)
    assert (hints.trial, hints.arm, hints.hints.pairs[0].teacher_layer) == (2, "control", "layer1.2")


def test_control_without_hints_is_exported_without_a_selection(
    client: MlflowClient, searched: SearchRecord, tmp_path: Path
) -> None:
    hints = export_hints(client, searched, tmp_path / "hints.yaml", trial=3)
    assert (hints.selection, hints.hints.pairs) == (None, [])


def test_exported_configuration_is_the_trial_s(exported: Path, suggested: Callable[..., Suggested]) -> None:
    trial = suggested(4)
    hints = load_hints(exported)
    assert hints.hints.configuration() == HintConfiguration.from_dict(trial.hints)
    assert hints.training.recipe["lr"] == trial.parameters["lr"]
    assert hints.selection is not None
    assert hints.selection.indices == trial.selection["indices"]
    assert hints.selection.clusters == trial.selection["clusters"]


def test_pairs_carry_the_normalisers_of_the_trial(exported: Path) -> None:
    pairs = load_hints(exported).hints.pairs
    assert [pair.normaliser for pair in pairs] == pytest.approx([0.1 * i for i in range(1, len(pairs) + 1)])


def test_teacher_is_identified(exported: Path, preparation: Preparation, client: MlflowClient) -> None:
    teacher = load_hints(exported).teacher
    assert teacher.sha256 == preparation.teacher.sha256
    assert (teacher.spec(), teacher.path) == (preparation.teacher.spec, "/storage/teacher.safetensors")
    assert (teacher.tracking_uri, teacher.val_accuracy) == (client.tracking_uri, 0.95)


def test_student_and_schedule_are_the_study_s(exported: Path, digits: Study) -> None:
    hints = load_hints(exported)
    assert hints.student.spec() == ModelSpec("resnet8", 10, 1, digits.student.width)
    assert tuple(hints.training.rungs) == digits.budget.rungs


def test_evidence_names_the_best_trial_of_each_control_arm(exported: Path) -> None:
    evidence = load_hints(exported).evidence
    assert (evidence.metric, evidence.value, evidence.seeds) == ("val_accuracy", 0.9, 1)
    assert {c.control: (c.trial, c.value) for c in evidence.controls} == {"kd_only": (3, 0.75), "stage_ends": (2, 0.8)}


def test_pruned_trial_cannot_be_exported(client: MlflowClient, searched: SearchRecord, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_hints(client, searched, tmp_path / "hints.yaml", trial=6)
    assert str(caught.value) == f"trial 6 of {NAME} is pruned, but must be completed; choose another"
    assert list(tmp_path.iterdir()) == []


def test_search_without_a_completed_trial_has_nothing_to_export(
    client: MlflowClient, searched: SearchRecord, tmp_path: Path
) -> None:
    none_completed = replace(searched, trials=tuple(t for t in searched.trials if t.outcome != "completed"))
    with pytest.raises(InputError, match=f"^{NAME} has no completed"):
        export_hints(client, none_completed, tmp_path / "hints.yaml")


def test_missing_artifact_is_an_error_of_one_line(client: MlflowClient, searched: SearchRecord, tmp_path: Path) -> None:
    other_run = replace(searched, parent_run_id=searched.trials[0].run_id)
    with pytest.raises(InputError) as caught:
        export_hints(client, other_run, tmp_path / "hints.yaml")
    assert str(caught.value).startswith(f"the artifact search.json of run {other_run.parent_run_id} cannot be read (")
    assert "\n" not in str(caught.value)


def test_file_says_how_to_use_it(exported: Path) -> None:
    assert exported.read_text().splitlines()[0].endswith("hintsearch distill hints.yaml")


def test_file_may_be_laid_out_anew(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "hints.yaml"
    path.write_text("# my notes\n" + yaml.safe_dump(yaml.safe_load(exported.read_text()), sort_keys=True))
    assert load_hints(path) == load_hints(exported)


def change(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return apply


def remove(*keys: str) -> Callable[[dict[str, Any]], None]:
    def apply(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("version", to=2), "FILE has version 2, but this hintsearch reads 1; export it again"),
        (change("version", to="one"), "FILE has version 'one', but this hintsearch reads 1; export it again"),
        (remove("version"), "FILE is no hint file (it has no version); export it again"),
        (
            change("hints", "logit_weight", to=3.0),
            "FILE was changed after it was written (its checksum differs); export it again",
        ),
        (
            change("teacher", "sha256", to="0" * 64),
            "FILE was changed after it was written (its checksum differs); export it again",
        ),
        (remove("checksum"), "FILE was changed after it was written (its checksum differs); export it again"),
        (remove("teacher"), "FILE is damaged: the key 'teacher' is missing; add it, or export it again"),
        (remove("hints", "pairs"), "FILE is damaged: the key 'hints.pairs' is missing; add it, or export it again"),
        (
            change("hints", "pairs", 0, "wieght", to=1),
            "FILE is damaged: unknown key 'hints.pairs.0.wieght'; did you mean 'weight'? (loss, normaliser, ",
        ),
        (change("trial", to="four"), 'FILE is damaged: trial is "four", but input should be a valid integer'),
        (change("hints", "temperature", to=0), "FILE is damaged: hints.temperature is 0, but input should be greater"),
    ],
)
def test_wrong_content_is_refused_in_one_line(
    exported: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = yaml.safe_load(exported.read_text())
    damage(content)
    path = tmp_path / "hints.yaml"
    path.write_text(yaml.safe_dump(content))
    assert refusal(path).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x80", "FILE is no hint file ('utf-8' codec can't decode byte 0xff"),
        (b"\x00\x01", "FILE is no hint file (unacceptable character #x0000"),
        (b"version: [", "FILE is no hint file (while parsing a flow node"),
        (b"version: 1\nday: 2026-13-45\n", "FILE is no hint file (month must be in 1..12); export it again"),
        (b"version: " + b"[" * 500, "FILE is no hint file (maximum recursion depth exceeded"),
        (b"", "FILE is no hint file (it has no version); export it again"),
        (b"- version\n", "FILE is no hint file (it has no version); export it again"),
        (b"name: digits\n", "FILE is no hint file (it has no version); export it again"),
    ],
)
def test_other_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hints.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(message)


def test_missing_file_is_refused_with_the_command_that_writes_one(tmp_path: Path) -> None:
    assert refusal(tmp_path / "mine.yaml") == (
        "there is no hint file FILE; write one by `hintsearch export NAME -o mine.yaml`"
    )


def test_folder_is_no_hint_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("there is no hint file FILE;")


def test_file_is_whole_or_as_it_was(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "hints.yaml"
    write_hints(path, load_hints(exported))
    before = path.read_text()
    unwritable = HintFile.model_construct(**{**load_hints(exported).__dict__, "data": {"root": object()}})
    with pytest.raises(Exception, match="object"):
        write_hints(path, unwritable)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["hints.yaml"]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_hints(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_file_of_before_a_part_was_added_is_still_whole(
    searched: SearchRecord, client: MlflowClient, tmp_path: Path
) -> None:
    content = export_hints(client, searched, tmp_path / "hints.yaml").model_dump(mode="json")
    for added in ("weights", "silhouette", "stability", "pairing"):
        del content["selection"][added]
    (tmp_path / "older.yaml").write_text(yaml.safe_dump({**content, "checksum": checksum(content)}))
    older = load_hints(tmp_path / "older.yaml")
    assert older.selection is not None
    assert older.selection.pairing == "by_depth"


def test_exported_selection_says_how_good_it_is(searched: SearchRecord, client: MlflowClient, tmp_path: Path) -> None:
    selection = export_hints(client, searched, tmp_path / "hints.yaml").selection
    assert selection is not None
    assert selection.pairing == "by_depth"
    assert selection.silhouette is None or -1 <= selection.silhouette <= 1
