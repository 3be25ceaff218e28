import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.models.errors import InputError
from hintsearch.models.weights import save_weights
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.estimate import TIMED_SECONDS, estimate
from hintsearch.search.node_checks import waiting_note
from hintsearch.search.places import tracking_uri
from hintsearch.search.preflight import check_can_be_sent, check_study, check_without_data, imbalance_note, job_note
from hintsearch.search.study import Study
from numpy.typing import NDArray

Studied = Callable[..., Study]


@pytest.fixture(autouse=True)
def isolated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def store(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def refusal(study: Study, tracking: str) -> str:
    with pytest.raises(InputError) as caught:
        check_study(study, tracking, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_study_gives_data_and_shapes(studied: Studied, tmp_path: Path) -> None:
    checked = check_study(studied(f"storage.path={tmp_path}/results"), store(tmp_path), None)
    shapes = checked.shapes
    assert (len(shapes.teacher), len(shapes.student), shapes.stages) == (9, 3, 3)
    assert checked.splits.test is None
    assert not checked.teacher_ready


def test_checking_creates_nothing(studied: Studied, tmp_path: Path) -> None:
    check_study(studied(f"storage.path={tmp_path}/there/results"), store(tmp_path / "there"), None)
    assert list(tmp_path.iterdir()) == []


def test_more_clusters_than_candidates_are_refused(studied: Studied) -> None:
    with pytest.raises(InputError) as caught:
        check_without_data(studied("space.hints.clusters.high=40"))
    assert str(caught.value) == (
        "space.hints.clusters.high is 40, but the teacher resnet20 has 9 candidates; choose 1..9"
    )


def test_teacher_with_fewer_candidates_than_the_student_has_stages_is_refused(studied: Studied) -> None:
    study = studied("layers.candidates=[layer3.2]", "space.hints.clusters=1")
    with pytest.raises(InputError, match=r"^the controls' K is 3, but the teacher resnet20 has 1 candidates"):
        check_without_data(study)


def test_too_few_images_for_r2_cca_are_refused(studied: Studied, tmp_path: Path) -> None:
    message = refusal(studied(f"storage.path={tmp_path}", "layers.images=100"), store(tmp_path))
    assert message.startswith("r2_cca needs at least 128 images for layers of 64 channels, but there are 100; ")
    assert "there are 100;" in message


def test_storage_below_a_file_is_refused(studied: Studied, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(studied(f"storage.path={tmp_path}/file/results"), store(tmp_path))
    assert message == (
        f"storage.path is {tmp_path}/file/results, but {tmp_path}/file is no folder; choose another place"
    )


def test_tracking_store_below_a_file_is_refused(studied: Studied, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(studied(f"storage.path={tmp_path}"), store(tmp_path / "file"))
    assert message.startswith(f"the tracking store is {tmp_path}/file/mlflow.db, but {tmp_path}/file is no folder;")


def test_more_cpus_than_the_machine_has_are_refused(studied: Studied, tmp_path: Path) -> None:
    cpus = os.cpu_count()
    message = refusal(studied(f"storage.path={tmp_path}", "resources.cpus_per_trial=1000"), store(tmp_path))
    assert message == (
        f"resources.cpus_per_trial is 1000, but this machine has {cpus} CPUs; choose 1..{cpus} or give --address"
    )


def test_more_gpus_than_the_machine_has_are_refused(studied: Studied, tmp_path: Path) -> None:
    message = refusal(studied(f"storage.path={tmp_path}", "resources.gpus_per_trial=8"), store(tmp_path))
    assert message.startswith("resources.gpus_per_trial is 8, but this machine has ")


def test_estimate_is_all_trials_to_their_last_epoch(studied: Studied, tmp_path: Path) -> None:
    study = studied(f"storage.path={tmp_path}", "data.train_fraction=0.15", "resources.concurrent_trials=1")
    cost = estimate(study, check_study(study, store(tmp_path), None))
    # Seven controls, twenty of the search, and two configurations and two controls with three seeds each.
    assert cost.trials == 7 + 20 + 12
    assert cost.epoch_seconds > 0
    assert cost.training_seconds == cost.wall_seconds == pytest.approx(39 * 24 * cost.epoch_seconds)
    assert not cost.teacher_cached


class CountingSplit:
    """A split that counts the images that are read of it for training, in all of its subsets together."""

    def __init__(self, whole: ImageSet, shown: list[int]) -> None:
        self._whole, self._shown = whole, shown

    def __len__(self) -> int:
        return len(self._whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def subset(self, indices: NDArray[np.intp]) -> ImageSet:
        self._shown.append(len(indices))
        return self._whole.subset(indices)


def test_estimate_of_many_images_trains_on_few(studied: Studied, tmp_path: Path) -> None:
    study = studied(f"storage.path={tmp_path}")
    checked = check_study(study, store(tmp_path), None)
    train = checked.splits.train
    assert isinstance(train, ImageSet)
    many, shown = 100_000, []
    repeated = CountingSplit(train.subset(np.arange(many) % len(train)), shown)
    splits = replace(checked.splits, train=repeated)  # type: ignore[arg-type]
    cost = estimate(study, replace(checked, splits=splits))
    # Each time four times as many, until it takes some time: far from all of them.
    assert shown == [32 * 4**time for time in range(len(shown))]
    assert sum(shown) < many / 2
    # What an epoch of so many takes is beyond what the measurement took.
    assert cost.epoch_seconds > TIMED_SECONDS


OWN_LOSSES = """
def good(student, teacher):
    return student.flatten(1).mean(dim=1).square() + teacher.flatten(1).mean(dim=1).square()


def bad(student, teacher):
    shown = student.shape
    raise RuntimeError(f"no loss for {len(shown)} axes")


def worse(student, teacher, labels, temperature):
    return student.view(-1, 3)
"""


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ("space.loss.hint=[FILE:bad]", "FILE, line 8, in bad raises RuntimeError (no loss for 4 axes); "),
        # Also one that is not used first.
        (
            "space.loss.hint=[fitnet, FILE:good+FILE:bad]",
            "FILE, line 8, in bad raises RuntimeError (no loss for 4 axes); ",
        ),
        (
            "space.loss.logit=[kd, FILE:worse]",
            "FILE, line 12, in worse raises RuntimeError (shape '[-1, 3]' is ",
        ),
    ],
)
def test_own_loss_that_raises_is_told_with_its_line(studied: Studied, tmp_path: Path, losses: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_LOSSES)
    study = studied(f"storage.path={tmp_path}", losses.replace("FILE", str(file)))
    with pytest.raises(InputError) as caught:
        estimate(study, check_study(study, store(tmp_path), None))
    assert str(caught.value).startswith(said.replace("FILE", str(file)))
    assert str(caught.value).endswith("; mend it before the search")


@pytest.mark.parametrize("value", [threading.Lock(), {"reader": [threading.Lock()]}])
def test_trap_6_what_cannot_be_sent_to_workers_is_refused_by_its_name(value: object) -> None:
    with pytest.raises(InputError) as caught:
        check_can_be_sent({"the study": {"seed": 1}, "the data set mine.py:load": value})
    assert str(caught.value) == (
        "the data set mine.py:load cannot be sent to Ray's workers (cannot pickle '_thread.lock' object); keep open "
        "files, locks and connections out of it, or open them when they are first used"
    )


@pytest.mark.parametrize(
    ("warmup", "epochs"),
    # The most hint points: a control's, of which the student's three stages have one each.
    [("indistill", 3 + 4 + 5), ("{base_epochs: 0}", 1 + 2 + 3), ("{epochs: [7, 2]}", 7 + 2 + 2), ("none", 0)],
)
def test_estimate_counts_the_epochs_of_a_warmup(studied: Studied, tmp_path: Path, warmup: str, epochs: int) -> None:
    overrides = (
        "data.train_fraction=0.15",
        "resources.concurrent_trials=1",
        "space.loss.hint=[at+sp]",
        "space.hints.clusters=2",
    )
    study = studied(f"storage.path={tmp_path}", *overrides, f"warmup={warmup}")
    cost = estimate(study, check_study(study, store(tmp_path), None))
    assert cost.warmup_epochs == epochs
    assert cost.training_seconds == pytest.approx(39 * (24 + epochs) * cost.epoch_seconds)


def test_estimate_trains_with_dynamic_weights(studied: Studied, tmp_path: Path) -> None:
    weighed = "dynamic_weights={meta_images: 20, meta_batch_size: 10}"
    study = studied(f"storage.path={tmp_path}", "data.train_fraction=0.15", weighed)
    checked = check_study(study, store(tmp_path), None)
    assert checked.splits.meta is not None
    assert len(checked.splits.meta) == 20
    assert estimate(study, checked).epoch_seconds > 0


def test_more_images_to_learn_weights_on_than_there_are_are_refused(studied: Studied, tmp_path: Path) -> None:
    message = refusal(studied(f"storage.path={tmp_path}", "dynamic_weights=hkd"), store(tmp_path))
    assert message.startswith("dynamic_weights.meta_images is 1000, but must be at least one for each of the 10 class")


SHUFFLED = "teacher.model=ShuffleV2"


@pytest.mark.parametrize("warmup", ["indistill", "{loss: strongest_channels, epochs: [1]}"])
def test_warmup_by_filters_that_a_wider_teacher_does_not_have_is_refused(studied: Studied, warmup: str) -> None:
    """Its blocks shuffle the channels of two branches, so that no convolution makes them in this order."""
    with pytest.raises(InputError) as caught:
        check_without_data(studied(SHUFFLED, "data.name=cifar100", f"warmup={warmup}"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the layer 'layer1.0' of ShuffleNetV2 gives ")
    assert message.endswith(
        "but no convolution makes them all in this order, so InDistill cannot score them; choose another layer or "
        "network"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [SHUFFLED, "warmup={loss: at}"],
        [SHUFFLED],
        # Not wider than any layer of the student, so nothing has to be chosen.
        [SHUFFLED, "warmup=indistill", "teacher.width=0.05", "student.model=resnet8x4", "student.width=2"],
        ["warmup=indistill"],
    ],
)
def test_warmup_that_suits_the_teacher_is_good(studied: Studied, overrides: list[str]) -> None:
    assert check_without_data(studied("data.name=cifar100", *overrides)).stages == 3


def test_automatic_number_of_clusters_fits_any_teacher(studied: Studied) -> None:
    study = studied("space.hints.clusters=auto")
    assert len(check_without_data(study).teacher) == 9 < study.space.hints.clusters.high


def uneven(counts: tuple[int, ...]) -> DataSplits:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = ImageSet(np.zeros((len(labels), 1, 2, 2), np.uint8), labels)
    return DataSplits(images, images, None, len(counts), (0.5,), (0.5,))


@pytest.mark.parametrize(("counts", "noted"), [((30, 10), True), ((29, 10), False), ((10, 10, 95), True)])
def test_imbalanced_classes_are_noted(studied: Studied, counts: tuple[int, ...], noted: bool) -> None:
    assert (imbalance_note(studied(), uneven(counts)) is not None) == noted


def test_imbalance_that_the_recipe_weighs_is_not_noted(studied: Studied) -> None:
    assert imbalance_note(studied("recipe.class_weights=balanced"), uneven((90, 10))) is None


def test_start_weights_that_do_not_fit_the_student_are_refused(studied: Studied, tmp_path: Path) -> None:
    save_weights(tmp_path / "other.safetensors", build_model(ModelSpec("resnet8", 10, 1)).state_dict())
    message = refusal(studied(f"student.checkpoint={tmp_path}/other.safetensors"), store(tmp_path))
    assert message.startswith(
        f"the weights of student.checkpoint {tmp_path}/other.safetensors do not fit CifarResNet: "
    )
    assert "conv1.weight is [16, 1, 3, 3] instead of [4, 1, 3, 3]" in message


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("cpus", "waits"), [(4, False), (5, True)])
def test_trials_that_wait_for_a_cluster_to_grow_are_told(studied: Callable[..., Study], cpus: int, waits: bool) -> None:
    note = waiting_note(studied(f"resources.cpus_per_trial={cpus}", "resources.concurrent_trials=1"))
    said = "No node has 5 CPUs and 0 GPUs at present: trials wait until the cluster has grown by one that has."
    assert note == (said if waits else None)


@pytest.mark.parametrize(
    ("storage", "store", "said"),
    [
        ("results", "sqlite:///mlflow.db", "{here}/results) and the tracking store ({here}/mlflow.db) lie in the copy"),
        ("results", "http://mlflow:5000", "{here}/results) lies in the copy of your folder that Ray made for this job"),
        ("/shared/results", "sqlite:///mlflow.db", "the tracking store ({here}/mlflow.db) lies in the copy"),
    ],
)
def test_results_that_go_with_a_ray_job_are_told(
    studied: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, store: str, said: str
) -> None:
    here = tmp_path / "working_dir_files" / "_ray_pkg_77d2e2a990f86d2b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    note = job_note(studied(f"storage.path={storage}"), tracking_uri(store, None))
    assert note is not None
    assert said.format(here=here) in note


def test_results_outside_of_a_ray_job_are_told_nothing_of(studied: Callable[..., Study]) -> None:
    assert job_note(studied("storage.path=/shared/results"), "http://mlflow:5000") is None
    assert job_note(studied(), tracking_uri(None, None)) is None
