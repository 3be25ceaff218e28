"""What every search stands on: the data, the teacher, its layers. Computed once, then cached."""

from dataclasses import dataclass

import numpy as np

from ..analysis.hint_selection import CONTROL_SELECTORS, HintSelection, select_control, select_hints
from ..analysis.layer_distances import LayerDistances
from ..analysis.pairing import pair_hints
from ..distill.data import DataSplits, load_data
from ..models.candidates import Candidate
from .layers import Layers, cached_layers, candidates_of, compute_layers
from .places import cache_folder
from .ray_session import ray_session
from .study import Study
from .teacher import Teacher, find_teacher, student_spec, train_teacher
from .view import View


@dataclass(frozen=True)
class Preparation:
    """Data, teacher and layers of a study.

    Attributes:
        splits: training and validation images; no test.
        teacher: ready to teach.
        layers: its candidates and their layer metrics.
        student: the student's candidates.
    """

    splits: DataSplits
    teacher: Teacher
    layers: Layers
    student: tuple[Candidate, ...]


def study_data(study: Study) -> DataSplits:
    """The study's training and validation images."""
    return load_data(study.data_spec(), cache_folder() / "data").without_test()


def prepare_teacher(study: Study, splits: DataSplits, view: View, address: str | None = None) -> Teacher:
    """The teacher from its checkpoint or the cache, else trained; starts Ray only if it has to be trained."""
    teacher = find_teacher(study, splits)
    trained = teacher is None
    if teacher is None:
        with ray_session(address), view.teacher_training(study.teacher.model) as on_epoch:
            teacher = train_teacher(study, splits, on_epoch)
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
    teacher = prepare_teacher(study, splits, view, address)
    layers = None if recompute else cached_layers(study, teacher, splits)
    if layers is None:
        images = min(study.layers.images, len(splits.train))
        with ray_session(address), view.layer_pass(images) as on_images:
            layers = compute_layers(study, teacher, splits, on_images)
    student = candidates_of(student_spec(study, splits), splits.image_shape, study.student.candidates)
    return Preparation(splits, teacher, layers, student)


def choose_hints(
    preparation: Preparation, seed: int, clusters: int, metrics: tuple[str, ...], selector: str
) -> tuple[HintSelection, list[tuple[str, str]]]:
    """Hint points by a selector or a control selector, and the (teacher layer, student layer) pairs they make."""
    candidates = preparation.layers.candidates
    if selector in CONTROL_SELECTORS:
        selection = select_control(candidates, clusters, selector, np.random.default_rng(seed))
    else:
        selection = select_hints(preparation.layers.distances, clusters, metrics, selector)
    points = [candidates[index - 1] for index in selection.indices]
    pairs = pair_hints(selector, points, len(candidates), preparation.student)
    return selection, [(point.path, layer.path) for point, layer in pairs]


def layer_distances(study: Study, view: View | None = None) -> LayerDistances:
    """The layer metrics of a study's teacher, for use from Python; trains the teacher if it is not cached."""
    return prepare(study, view or View()).layers.distances
