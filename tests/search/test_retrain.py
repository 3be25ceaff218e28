from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.weights import StateDict, read_weights, save_weights, weights_sha256
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.export import TeacherPart
from hintsearch.search.places import cached_teacher_path
from hintsearch.search.retrain import find_teacher_weights
from hintsearch.search.tracking import TrackedSearch
from mlflow.tracking import MlflowClient
from torch import nn

numbers = count(1)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def weights(teacher_network: nn.Module) -> StateDict:
    return teacher_network.state_dict()


@pytest.fixture(scope="module")
def others(weights: StateDict) -> StateDict:
    """Of another teacher of the same shape."""
    return {name: tensor + 1 for name, tensor in weights.items()}


@pytest.fixture
def teacher(weights: StateDict, teacher_spec: ModelSpec, tmp_path: Path) -> TeacherPart:
    """As a hint file names it; it lies nowhere yet."""
    return TeacherPart(
        model=teacher_spec.name,
        num_classes=teacher_spec.num_classes,
        in_channels=teacher_spec.in_channels,
        width=teacher_spec.width,
        sha256=weights_sha256(weights),
        path=str(tmp_path / "results" / "teacher.safetensors"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        run_id="0" * 32,
        artifact="teacher/teacher.safetensors",
        val_accuracy=0.9,
    )


@pytest.fixture
def in_mlflow(client: MlflowClient, teacher: TeacherPart, tmp_path: Path) -> Callable[[StateDict], TeacherPart]:
    """Logs weights to the real store; returns the teacher with that place."""

    def make(state: StateDict) -> TeacherPart:
        tracked = TrackedSearch(client, f"retrain-{next(numbers)}", "a search", None)
        save_weights(tmp_path / "logged" / "teacher.safetensors", state)
        tracked.add_file(tmp_path / "logged" / "teacher.safetensors", "teacher")
        return teacher.model_copy(update={"tracking_uri": client.tracking_uri, "run_id": tracked.parent_run_id})

    return make


def is_same(found: StateDict, weights: StateDict) -> bool:
    return set(found) == set(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_given_file_is_taken(teacher: TeacherPart, weights: StateDict, tmp_path: Path) -> None:
    save_weights(tmp_path / "mine.safetensors", weights)
    assert is_same(find_teacher_weights(teacher, tmp_path / "mine.safetensors"), weights)


def test_given_torch_file_of_the_same_weights_is_taken(
    teacher: TeacherPart, weights: StateDict, tmp_path: Path
) -> None:
    torch.save({"model": weights}, tmp_path / "mine.pt")
    assert is_same(find_teacher_weights(teacher, str(tmp_path / "mine.pt")), weights)


def test_given_file_of_another_teacher_is_refused_with_both_hashes(
    teacher: TeacherPart, others: StateDict, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(path, others)
    with pytest.raises(InputError) as caught:
        find_teacher_weights(teacher, path)
    assert str(caught.value) == (
        f"the weights of {path} have sha256 {weights_sha256(others)[:12]}, but the hints were found for a teacher with "
        f"{teacher.sha256[:12]}; give that teacher's file"
    )


def test_given_file_that_is_missing_is_refused_even_if_the_cache_has_the_teacher(
    teacher: TeacherPart, weights: StateDict, tmp_path: Path
) -> None:
    save_weights(cached_teacher_path(teacher.sha256), weights)
    with pytest.raises(InputError, match="there is no weights file"):
        find_teacher_weights(teacher, tmp_path / "mine.safetensors")


def test_teacher_is_found_in_the_cache(teacher: TeacherPart, weights: StateDict) -> None:
    save_weights(cached_teacher_path(teacher.sha256), weights)
    assert is_same(find_teacher_weights(teacher), weights)


def test_teacher_is_found_where_the_file_says(teacher: TeacherPart, weights: StateDict) -> None:
    save_weights(Path(teacher.path), weights)
    assert is_same(find_teacher_weights(teacher), weights)


def test_file_that_is_another_teacher_s_by_now_is_passed_over(
    in_mlflow: Callable[[StateDict], TeacherPart], weights: StateDict, others: StateDict
) -> None:
    teacher = in_mlflow(weights)
    save_weights(Path(teacher.path), others)
    assert is_same(find_teacher_weights(teacher), weights)


def test_teacher_is_found_in_mlflow_and_kept_in_the_cache(
    in_mlflow: Callable[[StateDict], TeacherPart], weights: StateDict
) -> None:
    teacher = in_mlflow(weights)
    assert is_same(find_teacher_weights(teacher), weights)
    assert weights_sha256(read_weights(cached_teacher_path(teacher.sha256))) == teacher.sha256


def test_other_teacher_in_mlflow_is_refused_and_not_cached(
    in_mlflow: Callable[[StateDict], TeacherPart], others: StateDict
) -> None:
    teacher = in_mlflow(others)
    with pytest.raises(InputError) as caught:
        find_teacher_weights(teacher)
    assert str(caught.value) == (
        f"the teacher's weights in {teacher.tracking_uri} are not those the hints were found with "
        f"(their sha256 differs from {teacher.sha256[:12]}); give their file by --teacher PATH"
    )
    assert not cached_teacher_path(teacher.sha256).exists()


def refusal(teacher: TeacherPart) -> str:
    with pytest.raises(InputError) as caught:
        find_teacher_weights(teacher)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_teacher_that_is_nowhere_names_the_three_places(teacher: TeacherPart) -> None:
    message = refusal(teacher)
    assert message.startswith(
        f"the teacher's weights (sha256 {teacher.sha256[:12]}) are neither in the cache nor at {teacher.path} nor in "
        f"MLflow at {teacher.tracking_uri} ("
    )
    assert message.endswith("); give their file by --teacher PATH")


def test_run_that_mlflow_does_not_have_names_the_three_places(client: MlflowClient, teacher: TeacherPart) -> None:
    message = refusal(teacher.model_copy(update={"tracking_uri": client.tracking_uri}))
    assert f"nor in MLflow at {client.tracking_uri} (" in message


def test_looking_for_a_teacher_creates_no_store(teacher: TeacherPart, tmp_path: Path) -> None:
    refusal(teacher)
    assert not (tmp_path / "mlflow.db").exists()
