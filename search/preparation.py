"""What every search stands on: the data, the teacher, its layers. Computed once, then cached."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..analysis.hint_selection import AUTO, CONTROL_SELECTORS, HintSelection, select_control, select_hints
from ..analysis.layer_distances import LayerDistances
from ..analysis.layer_statistics import Matrix
from ..analysis.pairing import BY_SIMILARITY, pair_hints
from ..analysis.stability import with_stability
from ..distill.data import DataSplits, load_data
from ..models.candidates import Candidate, stage_ends
from ..models.weights import StateDict
from .layer_actors import count_actors
from .layers import LayerPass, Layers, cached_layers, candidates_of, compute_layers, plan_pass
from .places import cache_folder
from .ray_session import ray_session
from .similarity import SIMILARITY_METRICS, cached_similarity, compute_similarity, train_reference_student
from .specs import student_spec, teacher_spec
from .study import Study
from .teacher import Teacher, find_teacher, start_weights, train_teacher, upper_study
from .view import View


@dataclass(frozen=True)
class Preparation:
    """Data, teacher and layers of a study.

    Attributes:
        splits: training and validation images; no test.
        teacher: ready to teach.
        layers: its candidates and their layer metrics.
        student: the student's candidates.
        similarity: CKA [teacher's candidates, student's candidates] if a pairing reads it.
        start: weights that students start from; None: random ones.
    """

    splits: DataSplits
    teacher: Teacher
    layers: Layers
    student: tuple[Candidate, ...]
    similarity: Matrix | None = None
    start: StateDict | None = None


def study_data(study: Study) -> DataSplits:
    """The study's training and validation images."""
    return load_data(study.data_spec(), cache_folder() / "data").without_test()


def prepare_teacher(study: Study, splits: DataSplits, view: View, address: str | None = None) -> Teacher:
    """The teacher from its checkpoint or the cache, else trained; starts Ray only if it has to be trained."""
    teacher = find_teacher(study, splits)
    trained = teacher is None
    if teacher is None:
        with ray_session(address):
            above = upper_study(study)
            upper = prepare_teacher(above, splits, view, address) if above else None
            with view.network_training(f"the teacher {study.teacher.model}") as report:
                teacher = train_teacher(study, splits, report, upper)
    view.teacher(teacher, trained)
    return teacher


def prepare(study: Study, view: View, address: str | None = None, recompute: bool = False) -> Preparation:
    """Brings data, teacher and layers together; starts Ray only if something has to be computed.

    Args:
        study: what to prepare.
        view: shows progress and results.
        address: of a Ray cluster.
        recompute: measure the layers even if they are in the cache.

    Raises:
        InputError: data, teacher or layers are not as the study says.
    """
    splits = study_data(study)
    # Before a teacher is trained for it.
    candidates = candidates_of(teacher_spec(study, splits), splits.image_shape, study.layers.candidates)
    layer_pass = plan_pass(study, candidates, len(splits.train), splits.classes)
    teacher = prepare_teacher(study, splits, view, address)
    layers = None if recompute else cached_layers(study, teacher, splits)
    if layers is None:
        layers = _measured_layers(study, teacher, splits, layer_pass, view, address)
    student = candidates_of(student_spec(study, splits), splits.image_shape, study.student.candidates)
    preparation = Preparation(splits, teacher, layers, student, start=start_weights(study))
    if BY_SIMILARITY in study.space.hints.pairings:
        preparation = with_similarity(preparation, study, view, address)
    return preparation


def with_similarity(preparation: Preparation, study: Study, view: View, address: str | None = None) -> Preparation:
    """The preparation with the similarities that `by_similarity` reads, from the cache or computed."""
    splits, teacher = preparation.splits, preparation.teacher
    similarity = cached_similarity(study, teacher, splits)
    if similarity is None:
        ours = preparation.layers.candidates
        layer_pass = plan_pass(
            study, (*ours, *preparation.student), len(splits.train), splits.classes, SIMILARITY_METRICS
        )
        with ray_session(address):
            with view.network_training(f"the student {study.student.model} by logits alone") as report:
                student = train_reference_student(study, teacher, splits, report)
            view.layer_plan(layer_pass, count_actors(study.layers.actors, len(layer_pass.plan.chunks)))
            with view.layer_pass("measuring teacher and student side by side", layer_pass.plan.images) as progress:
                similarity = compute_similarity(
                    study, teacher, student, splits, layer_pass, len(ours), progress.on_images
                )
    return replace(preparation, similarity=similarity)


def _measured_layers(
    study: Study, teacher: Teacher, splits: DataSplits, layer_pass: LayerPass, view: View, address: str | None
) -> Layers:
    with ray_session(address):
        view.layer_plan(layer_pass, count_actors(study.layers.actors, len(layer_pass.plan.chunks)))
        with view.layer_pass(
            "measuring the teacher's layers", layer_pass.plan.images, study.layers.bootstraps
        ) as progress:
            return compute_layers(study, teacher, splits, layer_pass, progress.on_images, progress.on_bootstrap)


@dataclass(frozen=True)
class HintChoice:
    """How hint points are chosen outside of a search.

    Attributes:
        clusters: how many, or "auto".
        metrics: layer metrics to combine.
        weights: of the metrics, 1 for one that is not in it.
        selector: a selector or a control selector.
        pairing: how they find their student layers.
        seed: of the random control.
    """

    clusters: int | Literal["auto"]
    metrics: tuple[str, ...]
    weights: Mapping[str, float]
    selector: str
    pairing: str
    seed: int


def choose_hints(preparation: Preparation, choice: HintChoice) -> tuple[HintSelection, list[tuple[str, str]]]:
    """Hint points with their stability, and the (teacher layer, student layer) pairs they make."""
    candidates, distances = preparation.layers.candidates, preparation.layers.distances
    if choice.selector in CONTROL_SELECTORS:
        points = len(stage_ends(preparation.student)) if choice.clusters == AUTO else choice.clusters
        selection = select_control(candidates, points, choice.selector, np.random.default_rng(choice.seed))
    else:
        chosen = select_hints(distances, choice.clusters, choice.metrics, choice.selector, choice.weights or None)
        selection = with_stability(distances, chosen)
    pairs = pair_hints(
        selection.selector,
        [candidates[index - 1] for index in selection.indices],
        len(candidates),
        preparation.student,
        choice.pairing,
        preparation.similarity,
    )
    return selection, [(point.path, layer.path) for point, layer in pairs]


def layer_distances(study: Study, view: View | None = None) -> LayerDistances:
    """The layer metrics of a study's teacher, for use from Python; trains the teacher if it is not cached."""
    return prepare(study, view or View()).layers.distances
