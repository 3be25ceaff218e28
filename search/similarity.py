"""How alike the teacher's layers are to those of a student that learnt by logits alone: what `by_similarity` pairs by.

The student is that of the `kd_only` control with the study's default values. Training it and measuring both networks on
the same images happens once; the result is cached by content.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..analysis.layer_statistics import Matrix
from ..analysis.pairwise_metrics import cka_linear
from ..distill.data import DataSplits
from ..distill.hint_configuration import HintConfiguration
from ..distill.trainer import Seeds
from ..models.candidates import Candidate
from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.own_code import own_code_sha256
from ..models.weights import weights_sha256
from .layer_actors import TappedNetwork, measure_layers
from .layers import METRICS_VERSION, LayerPass, layer_task
from .networks import TrainedNetwork, as_arrays
from .places import cache_folder
from .specs import student_spec
from .study import Study
from .teacher import TRAINING_VERSION, Teacher, start_weights
from .training import TrainingReport, TrainingTask, train_on_cluster

# What the pass over both networks is for.
SIMILARITY_METRICS = ("cka_linear",)


def cached_similarity(study: Study, teacher: Teacher, splits: DataSplits) -> Matrix | None:
    """The similarities from the cache, or None.

    Raises:
        InputError: the file is damaged.
    """
    path = _cache_path(study, teacher, splits)
    if not path.is_file():
        return None
    try:
        similarity: Matrix = np.load(path, allow_pickle=False)
    except Exception as error:
        # A damaged file makes the decoder raise anything.
        raise InputError(f"{path} cannot be read ({reason(error)}); remove it to compute it again") from error
    return similarity


def train_reference_student(
    study: Study, teacher: Teacher, splits: DataSplits, report: TrainingReport | None = None
) -> TrainedNetwork:
    """Trains the student by logits alone; Ray must be running.

    Args:
        study: its space, recipe and budget are used.
        teacher: what the student learns from.
        splits: training and validation images.
        report: where the training reports to.
    """
    task = _student_task(study, teacher, splits)
    return TrainedNetwork(task.spec, as_arrays(train_on_cluster(task, splits, study.resources, report)))


def compute_similarity(
    study: Study,
    teacher: Teacher,
    student: TrainedNetwork,
    splits: DataSplits,
    layer_pass: LayerPass,
    border: int,
    on_images: Callable[[int], None] | None = None,
) -> Matrix:
    """Measures both networks on the same images, and puts the result into the cache; Ray must be running.

    Args:
        study: its layers section is used.
        teacher: with the first candidates of the pass.
        student: with the others.
        splits: the training images are read.
        layer_pass: over the candidates of both, for `SIMILARITY_METRICS`.
        border: how many of them are the teacher's.
        on_images: called with the number of images done so far.

    Returns:
        Linear CKA [teacher's candidates, student's candidates], 0..1.
    """
    measured = layer_pass.candidates
    networks = (
        TappedNetwork(teacher.trained(), _paths(measured[:border])),
        TappedNetwork(student, _paths(measured[border:])),
    )
    task = layer_task(study, splits, layer_pass, networks)
    evidence = measure_layers(task, study.layers.actors, on_images).measurement(measured).evidence()
    similarity = 1 - cka_linear(evidence)[:border, border:]
    with replacing(_cache_path(study, teacher, splits)) as temporary, temporary.open("wb") as file:
        np.save(file, similarity)
    return similarity


def _student_task(study: Study, teacher: Teacher, splits: DataSplits) -> TrainingTask:
    """The training of the `kd_only` control's first trial."""
    weight, temperature = study.space.weight, study.space.temperature
    hints = HintConfiguration(
        classification_weight=weight.classification.default,
        logit_weight=weight.logit.default,
        logit_loss=study.space.loss.logit[0],
        temperature=temperature.default,
    )
    lr = study.space.lr.default if study.space.lr else None
    return TrainingTask(
        student_spec(study, splits),
        study.recipe.recipe(lr),
        study.budget.rungs,
        Seeds(study.seed, study.seed),
        hints,
        teacher.trained(),
        start_weights(study),
    )


def _paths(candidates: tuple[Candidate, ...]) -> tuple[str, ...]:
    return tuple(candidate.path for candidate in candidates)


def _cache_path(study: Study, teacher: Teacher, splits: DataSplits) -> Path:
    task = _student_task(study, teacher, splits)
    assert task.hints is not None
    made_by = {
        "version": [METRICS_VERSION, TRAINING_VERSION],
        "teacher": teacher.sha256,
        "teacher_spec": asdict(teacher.spec),
        "student": asdict(task.spec),
        "factories": [own_code_sha256(teacher.spec.name), own_code_sha256(task.spec.name)],
        "start": weights_sha256(task.start) if task.start else None,
        "precision": study.resources.precision,
        "data": splits.sha256(),
        "recipe": asdict(task.recipe),
        "rungs": task.rungs,
        "hints": task.hints.to_dict(),
        "seed": study.seed,
        "student_candidates": study.student.candidates,
        **study.layers.model_dump(include={"candidates", "images", "chunk", "memory_gb"}),
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "similarity" / f"{key}.npy"
