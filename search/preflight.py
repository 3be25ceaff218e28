"""What is checked before anything is trained or created."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from ray import cloudpickle

from ..distill.data import DataSplits, known_shape
from ..distill.feature_losses import STRONGEST_CHANNELS
from ..distill.loss_presets import LOSS_PRESETS
from ..models.candidates import Candidate, stage_ends
from ..models.errors import InputError, reason
from ..models.filter_norms import strongest_channels
from ..models.weights import apply_weights
from ..models.zoo import build_model
from .layers import candidates_of, plan_pass
from .places import sqlite_file
from .preparation import study_data
from .specs import model_spec, student_spec
from .study import Study
from .teacher import find_teacher, start_weights
from .tracking import connect

# Of the largest class to the smallest: less is common, and matters little.
NOTED_IMBALANCE = 3
# How Ray names the folders that it unpacks a job's --working-dir into.
JOB_COPY = "_ray_pkg_"


@dataclass(frozen=True)
class Shapes:
    """Teacher and student for the study's image size.

    Attributes:
        teacher: the teacher's candidates.
        student: the student's candidates.
        stages: number of the student's stages, which is the K of a control.
    """

    teacher: tuple[Candidate, ...]
    student: tuple[Candidate, ...]
    stages: int


def check_shapes(study: Study, classes: int, image_shape: tuple[int, int, int]) -> Shapes:
    """Builds both networks and checks the space against their layers; needs no data.

    Raises:
        InputError: a network that cannot be built, or more clusters than candidates.
    """
    teacher = candidates_of(
        model_spec("teacher", study.teacher, classes, image_shape), image_shape, study.layers.candidates
    )
    student = candidates_of(
        model_spec("student", study.student, classes, image_shape), image_shape, study.student.candidates
    )
    stages = len(stage_ends(student))
    clusters = study.space.hints.clusters
    # What `auto` chooses always fits.
    if not clusters.auto:
        check_clusters("space.hints.clusters.high", clusters.high, study.teacher.model, len(teacher))
    check_clusters("the controls' K", stages, study.teacher.model, len(teacher))
    if STRONGEST_CHANNELS in study.losses():
        _check_filters(study, classes, image_shape, teacher, student)
    return Shapes(teacher, student, stages)


def _check_filters(
    study: Study,
    classes: int,
    image_shape: tuple[int, int, int],
    teacher: tuple[Candidate, ...],
    student: tuple[Candidate, ...],
) -> None:
    """Raises `InputError` if a candidate of the teacher may be wider than its student layer, but has no filters."""
    spec = model_spec("teacher", study.teacher, classes, image_shape)
    network, narrowest = build_model(spec), min(candidate.channels for candidate in student)
    for candidate in teacher:
        if candidate.channels > narrowest:
            strongest_channels(network, candidate.path, spec.input_shape(image_shape), narrowest)


def check_clusters(key: str, clusters: int, teacher: str, candidates: int) -> None:
    """Raises `InputError` if there are not as many candidates as hint points are asked for."""
    if not 1 <= clusters <= candidates:
        raise InputError(
            f"{key} is {clusters}, but the teacher {teacher} has {candidates} candidates; choose 1..{candidates}"
        )


def check_without_data(study: Study) -> Shapes:
    """The dry run: schema (already loaded) and model shapes for the data set's known image size.

    Raises:
        InputError: what `check_shapes` raises; a folder of npz files, whose images have to be read.
    """
    known = known_shape(study.data.name, study.data_spec().image_size)
    if known is None:
        splits = study_data(study)
        known = splits.classes, splits.image_shape
    return check_shapes(study, *known)


@dataclass(frozen=True)
class Checked:
    """What was found on the way.

    Attributes:
        splits: the study's training and validation images.
        shapes: of teacher and student.
        teacher_ready: whether the teacher is there already and need not be trained.
    """

    splits: DataSplits
    shapes: Shapes
    teacher_ready: bool


def check_study(study: Study, tracking_uri: str, address: str | None) -> Checked:
    """Everything that can be known before Ray starts; creates nothing.

    Raises:
        InputError: the first thing that would fail later.
    """
    storage = Path(study.storage.path)
    if storage.exists() and not storage.is_dir():
        raise InputError(f"storage.path is {storage}, but that is no folder; choose another place")
    _check_writable(storage, "storage.path")
    store = sqlite_file(tracking_uri)
    if store is not None:
        _check_writable(store, "the tracking store")
    else:
        connect(tracking_uri, create=False)
    if address is None and "RAY_ADDRESS" not in os.environ:
        _check_local_resources(study)
    splits = study_data(study)
    check_can_be_sent({"the study": study, f"the data set {study.data.name}": splits})
    shapes = check_shapes(study, splits.classes, splits.image_shape)
    plan_pass(study, shapes.teacher, len(splits.train), splits.classes)
    start = start_weights(study)
    if start is not None:
        apply_weights(build_model(student_spec(study, splits)), start, f"student.checkpoint {study.student.checkpoint}")
    return Checked(splits, shapes, find_teacher(study, splits) is not None)


def check_can_be_sent(parts: Mapping[str, object]) -> None:
    """Raises `InputError` for what Ray could not send to its workers.

    Args:
        parts: by what the user knows them as.
    """
    for name, part in parts.items():
        try:
            # Arrays are looked at, not copied.
            cloudpickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=lambda _: None)
        except Exception as error:
            # What refuses to be pickled raises anything.
            raise InputError(
                f"{name} cannot be sent to Ray's workers ({reason(error)}); keep open files, locks and connections out "
                "of it, or open them when they are first used"
            ) from error


def imbalance_note(study: Study, splits: DataSplits) -> str | None:
    """What to think of where one class has many more training images than another; None where that is not so."""
    counts = np.bincount(splits.train.labels, minlength=splits.classes)
    ratio = counts.max() / counts.min()
    if ratio < NOTED_IMBALANCE or study.recipe.class_weights != "none":
        return None
    return (
        f"The largest class has {ratio:.1f} times the training images of the smallest: think of "
        "recipe.class_weights=balanced and objective.metric=val_macro_f1."
    )


def job_note(study: Study, tracking_uri: str) -> str | None:
    """What is lost with the folder that a Ray job runs in, Ray's copy of the user's; None if nothing is.

    Args:
        study: its storage is looked at.
        tracking_uri: of the tracking store.
    """
    store = sqlite_file(tracking_uri)
    places = {"storage.path": Path(study.storage.path)} | ({"the tracking store": store} if store else {})
    lost = [f"{what} ({place.resolve()})" for what, place in places.items() if _in_a_job_s_copy(place)]
    if not lost:
        return None
    return (
        f"{' and '.join(lost)} {'lie' if len(lost) > 1 else 'lies'} in the copy of your folder that Ray made for this "
        "job, and will go with it: name places outside of it that all nodes see."
    )


def _in_a_job_s_copy(place: Path) -> bool:
    return any(part.startswith(JOB_COPY) for part in place.resolve().parts)


def preset_note(study: Study) -> str | None:
    """What a preset of losses stands for; None without one."""
    if study.space.preset is None:
        return None
    said = LOSS_PRESETS.entry(study.space.preset).facts["loss"]
    return (
        f"Losses by the preset {study.space.preset}: {said}, τ {study.space.temperature.default:g}; what the study "
        "says of these itself is left out."
    )


def _check_local_resources(study: Study) -> None:
    resources, cpus, gpus = study.resources, os.cpu_count() or 1, torch.cuda.device_count()
    if resources.gpus_per_trial > gpus:
        raise InputError(
            f"resources.gpus_per_trial is {resources.gpus_per_trial:g}, but this machine has {gpus} GPUs; "
            f"choose 0..{gpus} or give --address"
        )
    if resources.cpus > max(cpus, resources.cpus_per_trial):
        raise InputError(
            f"each of the {resources.workers} workers of a trial needs a CPU, but this machine has {cpus} CPUs; lower "
            "resources.workers_per_trial or give --address"
        )
    if resources.cpus_per_trial > cpus:
        raise InputError(
            f"resources.cpus_per_trial is {resources.cpus_per_trial}, but this machine has {cpus} CPUs; "
            f"choose 1..{cpus} or give --address"
        )


def _check_writable(path: Path, what: str) -> None:
    """Whether the file or folder `path` can be made or written; leaves nothing behind."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise InputError(f"{what} is {path}, but {place} is no folder; choose another place")
    try:
        # Permissions do not tell of a file system that is read-only or holds no files.
        with TemporaryFile(dir=place) if place.is_dir() else place.open("ab"):
            pass
    except OSError as error:
        raise InputError(
            f"{what} is {path}, but {place} cannot be written ({error.strerror}); choose another place"
        ) from error
