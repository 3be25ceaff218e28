"""The layer metrics of a study's teacher, measured once and cached."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.layer_distances import LayerDistances
from ..analysis.layer_metrics import layer_distances as distances_of_sums
from ..distill.data import DataSplits
from ..models.candidates import Candidate, list_candidates
from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.zoo import ModelSpec, build_model
from .layer_actors import layer_task, measure_layers
from .places import cache_folder
from .study import Study
from .teacher import Teacher

# Part of the cache key: bump it when a metric's or a sum's code changes its result.
METRICS_VERSION = 1


@dataclass(frozen=True)
class Layers:
    """The teacher's layers.

    Attributes:
        candidates: in depth order.
        distances: the layer metrics.
    """

    candidates: tuple[Candidate, ...]
    distances: LayerDistances


def candidates_of(
    spec: ModelSpec, image_shape: tuple[int, int, int], paths: tuple[str, ...] | None = None
) -> tuple[Candidate, ...]:
    """The candidates of a network, for images of that shape."""
    return list_candidates(build_model(spec), image_shape, paths)


def cached_layers(study: Study, teacher: Teacher, splits: DataSplits) -> Layers | None:
    """The layer metrics from the cache, or None."""
    path = _cache_path(study, teacher, splits)
    if not path.is_file():
        return None
    candidates = candidates_of(teacher.spec, splits.image_shape, study.layers.candidates)
    return Layers(candidates, read_distances(path))


def compute_layers(
    study: Study, teacher: Teacher, splits: DataSplits, on_images: Callable[[int], None] | None = None
) -> Layers:
    """Measures the layers by Ray actors and puts the metrics into the cache; Ray must be running.

    Args:
        study: its layers section is used.
        teacher: what to measure.
        splits: the training images are read.
        on_images: called with the number of images done so far.

    Raises:
        InputError: too few images for a metric.
    """
    candidates = candidates_of(teacher.spec, splits.image_shape, study.layers.candidates)
    paths = tuple(candidate.path for candidate in candidates)
    task = layer_task(teacher.spec, teacher.arrays(), paths, splits, study.layers.images)
    sums = measure_layers(task, study.layers.chunk, study.layers.actors, on_images)
    distances = distances_of_sums(sums, paths, study.layers.metrics)
    write_distances(_cache_path(study, teacher, splits), distances)
    return Layers(candidates, distances)


def write_distances(path: Path, distances: LayerDistances) -> None:
    """Writes layer metrics as npz, whole or not at all."""
    arrays: dict[str, Any] = {f"distance.{name}": matrix for name, matrix in distances.distances.items()}
    arrays |= {f"score.{name}": values for name, values in distances.scores.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, paths=np.array(distances.paths), images=np.array(distances.images), **arrays)


def read_distances(path: Path) -> LayerDistances:
    """Reads what `write_distances` wrote.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        return LayerDistances(
            tuple(str(name) for name in arrays["paths"]),
            {name.removeprefix("distance."): arrays[name] for name in arrays if name.startswith("distance.")},
            {name.removeprefix("score."): arrays[name] for name in arrays if name.startswith("score.")},
            int(arrays["images"]),
        )
    except Exception as error:
        # A damaged archive makes the decoders raise anything: BadZipFile, zlib.error, TypeError, ...
        raise InputError(
            f"{path} cannot be read as layer metrics ({reason(error)}); remove it to compute it again"
        ) from error


def _cache_path(study: Study, teacher: Teacher, splits: DataSplits) -> Path:
    made_by = {
        "version": METRICS_VERSION,
        "teacher": teacher.sha256,
        "spec": asdict(teacher.spec),
        "data": splits.sha256(),
        "candidates": study.layers.candidates,
        "metrics": study.layers.metrics,
        "images": study.layers.images,
        "chunk": study.layers.chunk,
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "layers" / f"{key}.npz"
