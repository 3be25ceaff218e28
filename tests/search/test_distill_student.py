"""Retraining from a hint file: several students, where they start, and whose code runs."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hintsearch.distill.recipe import Recipe
from hintsearch.models.errors import InputError
from hintsearch.models.own_code import own_code_sha256
from hintsearch.models.weights import StateDict, read_weights, save_weights, weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.export import HintFile
from hintsearch.search.retrain import RetrainedStudent, distill_student

pytestmark = pytest.mark.usefixtures("cache")

RECIPE = {**asdict(Recipe(lr=0.1, batch_size=64, crop_padding=0, flip=False)), "milestones": [0.5]}
OWN_DATA = """
import numpy as np

def load():
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 100, (8, 8)).astype(np.uint8) + 100 * (n % 2), n % 2) for n in range(60)]
    return items[:40], None, items[40:]
"""


def hint_file(**changes: Any) -> HintFile:
    """Of a student that learns from labels alone, so that it needs no teacher."""
    network = {"model": "resnet8", "num_classes": 10, "in_channels": 1, "width": 0.25}
    nowhere = {"sha256": "0" * 64, "path": "/nowhere", "artifact": "teacher/teacher.safetensors"}
    teacher = {**network, **nowhere, "tracking_uri": "sqlite:////nowhere.db", "run_id": "0" * 32, "val_accuracy": 0.9}
    data = {"name": "digits", "train_fraction": 0.1, "mean": [0.3], "sd": [0.3]}
    hints = {"pairs": [], "classification_weight": 1, "logit_weight": 0, "logit_loss": "kd", "temperature": 4}
    training = {"recipe": RECIPE, "rungs": [2], "data_seed": 3, "init_seed": 5, "threads": 1}
    evidence = {"metric": "val_accuracy", "direction": "maximize", "value": 0.5, "seeds": 1, "run_id": "0" * 32}
    content = {
        "version": 1,
        "search": "made",
        "trial": 1,
        "arm": "control",
        "teacher": teacher,
        "student": network,
        "data": data,
        "hints": hints,
        "selection": None,
        "training": training,
        "evidence": {**evidence, "controls": []},
        "provenance": {},
    }
    return HintFile.model_validate({**content, **changes})


def figures(student: RetrainedStudent) -> tuple[dict[str, float], float, str]:
    """All but the speed, which no two runs share."""
    metrics = {name: value for name, value in student.validation.items() if name != "images_per_second"}
    return metrics, student.test_accuracy, weights_sha256(read_weights(student.path))


def own_data(folder: Path) -> str:
    (folder / "mine.py").write_text(OWN_DATA)
    return f"{folder / 'mine.py'}:load"


def of_own_data(name: str) -> HintFile:
    student = {"model": "resnet8", "num_classes": 2, "in_channels": 1, "width": 0.25}
    data = {"name": name, "mean": [0.3], "sd": [0.3]}
    return hint_file(student=student, data=data, data_code_sha256=own_code_sha256(name))


@pytest.fixture
def start(tmp_path: Path) -> tuple[StateDict, Path]:
    torch.manual_seed(9)
    weights = build_model(ModelSpec("resnet8", 10, 1, 0.25)).state_dict()
    save_weights(tmp_path / "start.safetensors", weights)
    return weights, tmp_path / "start.safetensors"


def test_several_students_are_those_of_separate_runs(tmp_path: Path) -> None:
    together = distill_student(hint_file(), seeds=3, output=tmp_path / "s.safetensors")
    assert [(student.data_seed, student.init_seed) for student in together] == [(3, 5), (3, 6), (3, 7)]
    for student in together:
        training = hint_file().training.model_copy(update={"init_seed": student.init_seed})
        (alone,) = distill_student(
            hint_file().model_copy(update={"training": training}), output=tmp_path / "alone.safetensors"
        )
        assert figures(student) == figures(alone)


def test_epochs_of_all_students_are_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    distill_student(
        hint_file(), seeds=2, output=tmp_path / "s.pt", on_epoch=lambda seed, result: seen.append((seed, result.epoch))
    )
    assert seen == [(5, 1), (6, 1), (5, 2), (6, 2)]


def test_student_starts_from_the_recorded_weights(tmp_path: Path, start: tuple[StateDict, Path]) -> None:
    weights, path = start
    still = {**RECIPE, "lr": 1e-30, "weight_decay": 0.0}
    recorded = {"sha256": weights_sha256(weights), "path": str(path), "artifact": "student/start.safetensors"}
    content = hint_file(
        training={**hint_file().training.model_dump(), "recipe": still},
        student={**hint_file().student.model_dump(), "start": recorded},
    )
    (student,) = distill_student(content, output=tmp_path / "s.safetensors")
    torch.testing.assert_close(read_weights(student.path)["conv1.weight"], weights["conv1.weight"])


def test_start_weights_that_are_nowhere_are_an_error_that_says_so(tmp_path: Path) -> None:
    recorded = {"sha256": "1" * 64, "path": "/nowhere/start.pt", "artifact": "student/start.safetensors"}
    content = hint_file(student={**hint_file().student.model_dump(), "start": recorded})
    with pytest.raises(InputError) as caught:
        distill_student(content, output=tmp_path / "s.safetensors")
    message = str(caught.value)
    assert message.startswith("the weights the student starts from (sha256 111111111111) are neither in the cache nor ")
    assert message.endswith("bring the file back, or name another student by --student")


def test_code_for_data_of_a_hint_file_does_not_run_unasked(tmp_path: Path) -> None:
    name = own_data(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"the hint file names the code .*mine.py:load .*add --trust-code to run it"):
        distill_student(of_own_data(name), output=tmp_path / "s.safetensors")


def test_refusal_to_run_code_shows_its_file_and_hash(tmp_path: Path) -> None:
    name = own_data(tmp_path)
    with pytest.raises(InputError) as caught:
        distill_student(of_own_data(name), output=tmp_path / "s.safetensors")
    sha256 = own_code_sha256(name)
    assert sha256 is not None
    assert f"(data; {tmp_path / 'mine.py'}, sha256 {sha256[:12]} at the export)" in str(caught.value)


def test_refusal_to_run_code_lists_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("")
    content = of_own_data(own_data(tmp_path))
    student = content.student.model_copy(update={"model": f"{tmp_path}/nets.py:small"})
    teacher = content.teacher.model_copy(update={"model": f"{tmp_path}/nets.py:big"})
    with pytest.raises(InputError) as caught:
        distill_student(content.model_copy(update={"student": student, "teacher": teacher}))
    assert all(f"{name} (" in str(caught.value) for name in ("nets.py:small", "nets.py:big", "mine.py:load"))


def test_trusted_code_for_data_runs(tmp_path: Path) -> None:
    content = of_own_data(own_data(tmp_path))
    (student,) = distill_student(content, output=tmp_path / "s.safetensors", trust_code=True)
    assert 0 <= student.test_accuracy <= 1


def test_code_for_data_that_changed_since_the_export_is_refused(tmp_path: Path) -> None:
    content = of_own_data(own_data(tmp_path))
    (tmp_path / "mine.py").write_text(OWN_DATA + "\n# changed\n")
    with pytest.raises(InputError, match=r"mine\.py:load has changed since the export"):
        distill_student(content, output=tmp_path / "s.safetensors", trust_code=True)


def test_unknown_preset_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe preset 'cifar_2'; did you mean 'cifar_240'"):
        distill_student(hint_file(), output=tmp_path / "s.safetensors", preset="cifar_2")
    assert not (tmp_path / "s.safetensors").exists()


def test_bf16_of_a_hint_file_is_used_where_the_machine_has_it(tmp_path: Path) -> None:
    training = hint_file().training.model_copy(update={"precision": "bf16"})
    (student,) = distill_student(
        hint_file().model_copy(update={"training": training}), output=tmp_path / "s.safetensors"
    )
    (full,) = distill_student(hint_file(), output=tmp_path / "full.safetensors")
    assert student.validation["train_loss"] == pytest.approx(full.validation["train_loss"], rel=0.05)
    assert replace(student, validation={}).init_seed == full.init_seed
