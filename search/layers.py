"""The layer metrics of a study's teacher, measured once and cached."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.layer_distances import LayerDistances
from ..analysis.layer_metrics import check_enough_images, what_they_read
from ..analysis.layer_metrics import layer_distances as distances_of_measurement
from ..analysis.reading_plan import Columns, Memory, ReadingPlan, plan_columns, plan_reading, sums_memory
from ..distill.data import DataSplits
from ..models.candidates import Candidate, list_candidates
from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.own_code import own_code_sha256
from ..models.zoo import ModelSpec, build_model
from .layer_actors import LayerTask, TappedNetwork, measure_layers
from .places import cache_folder
from .study import Study
from .teacher import Teacher

# Part of the cache key: bump it when a metric's or a sum's code changes its result.
METRICS_VERSION = 3


@dataclass(frozen=True)
class Layers:
    """The teacher's layers.

    Attributes:
        candidates: in depth order.
        distances: the layer metrics.
    """

    candidates: tuple[Candidate, ...]
    distances: LayerDistances


@dataclass(frozen=True)
class LayerPass:
    """What reading the teacher's layers takes, known before it starts.

    Attributes:
        candidates: in depth order.
        plan: how the images are cut.
        columns: of the sums.
        memory: of the sums.
        metrics: what it is for.
    """

    candidates: tuple[Candidate, ...]
    plan: ReadingPlan
    columns: Columns
    memory: Memory
    metrics: tuple[str, ...]


def candidates_of(
    spec: ModelSpec, image_shape: tuple[int, int, int], paths: tuple[str, ...] | None = None
) -> tuple[Candidate, ...]:
    """The candidates of a network, for data with images of that shape."""
    return _traced(spec, image_shape, paths, own_code_sha256(spec.name))


# Several steps of one command ask for them, and building a network takes up to seconds. The code is part of the key:
# who works in a notebook may have changed it.
@cache
def _traced(
    spec: ModelSpec, image_shape: tuple[int, int, int], paths: tuple[str, ...] | None, _code_sha256: str | None
) -> tuple[Candidate, ...]:
    return list_candidates(build_model(spec), spec.input_shape(image_shape), paths)


def plan_pass(
    study: Study,
    candidates: tuple[Candidate, ...],
    train_images: int,
    classes: int,
    metrics: tuple[str, ...] | None = None,
) -> LayerPass:
    """Plans a pass over the first `layers.images` training images; needs neither data nor Ray.

    Args:
        study: its layers section is used.
        candidates: of one network, or of several that are read side by side.
        train_images: how many there are.
        classes: number of classes.
        metrics: what the pass is for; None: the study's.

    Raises:
        InputError: too few images for a metric, or too little memory.
    """
    layers = study.layers
    plan = plan_reading(min(layers.images, train_images), layers.chunk)
    channels = [candidate.channels for candidate in candidates]
    columns = plan_columns(channels, classes, layers.chunk, layers.memory_gb * 1e9, study.seed)
    metrics = layers.metrics if metrics is None else metrics
    check_enough_images(metrics, plan, columns)
    return LayerPass(candidates, plan, columns, sums_memory(columns, layers.chunk), metrics)


def layer_task(
    study: Study, splits: DataSplits, layer_pass: LayerPass, networks: tuple[TappedNetwork, ...]
) -> LayerTask:
    """What the actors of a pass need; the networks' candidates are those of the pass, one network after the other."""
    return LayerTask(
        networks,
        splits.train.subset(np.arange(layer_pass.plan.images)),
        splits.preprocessing,
        layer_pass.plan,
        layer_pass.columns,
        what_they_read(layer_pass.metrics),
        study.layers.batch,
        study.resources.device == "cpu",
    )


def cached_layers(study: Study, teacher: Teacher, splits: DataSplits) -> Layers | None:
    """The layer metrics from the cache, or None."""
    path = _cache_path(study, teacher, splits)
    if not path.is_file():
        return None
    candidates = candidates_of(teacher.spec, splits.image_shape, study.layers.candidates)
    return Layers(candidates, read_distances(path))


def compute_layers(
    study: Study,
    teacher: Teacher,
    splits: DataSplits,
    layer_pass: LayerPass,
    on_images: Callable[[int], None] | None = None,
    on_bootstrap: Callable[[int], None] | None = None,
) -> Layers:
    """Measures the layers by Ray actors and puts the metrics into the cache; Ray must be running.

    Args:
        study: its layers section is used.
        teacher: what to measure.
        splits: the training images are read.
        layer_pass: what `plan_pass` gave.
        on_images: called with the number of images done so far.
        on_bootstrap: called with the number of bootstraps done so far.
    """
    candidates = layer_pass.candidates
    paths = tuple(candidate.path for candidate in candidates)
    task = layer_task(study, splits, layer_pass, (TappedNetwork(teacher.trained(), paths),))
    measurement = measure_layers(task, study.layers.actors, on_images).measurement(candidates)
    distances = distances_of_measurement(
        measurement, study.layers.metrics, study.layers.bootstraps, study.seed, on_bootstrap
    )
    write_distances(_cache_path(study, teacher, splits), distances)
    return Layers(candidates, distances)


def write_distances(path: Path, distances: LayerDistances) -> None:
    """Writes layer metrics as npz, whole or not at all."""
    arrays: dict[str, Any] = {
        **_prefixed("distance", distances.distances),
        **_prefixed("score", distances.scores),
        **_prefixed("bootstrap", distances.bootstraps),
    }
    arrays |= {"paths": np.array(distances.paths), "images": np.array(distances.images)}
    arrays["widths"] = np.array(distances.widths, dtype=np.int64)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


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
            _unprefixed("distance", arrays),
            _unprefixed("score", arrays),
            int(arrays["images"]),
            _unprefixed("bootstrap", arrays),
            tuple(int(width) for width in arrays["widths"]),
        )
    except Exception as error:
        # A damaged archive makes the decoders raise anything: BadZipFile, zlib.error, TypeError, ...
        raise InputError(
            f"{path} cannot be read as layer metrics ({reason(error)}); remove it to compute it again"
        ) from error


def _prefixed(kind: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{kind}.{name}": array for name, array in arrays.items()}


def _unprefixed(kind: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{kind}."): array for name, array in arrays.items() if name.startswith(f"{kind}.")}


def _cache_path(study: Study, teacher: Teacher, splits: DataSplits) -> Path:
    layers = study.layers
    made_by = {
        "version": METRICS_VERSION,
        "teacher": teacher.sha256,
        "spec": asdict(teacher.spec),
        "factory": own_code_sha256(teacher.spec.name),
        "data": splits.sha256(),
        "seed": study.seed,
        # The number of actors, and of images a forward pass, change nothing.
        **layers.model_dump(include={"candidates", "metrics", "images", "chunk", "memory_gb", "bootstraps"}),
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "layers" / f"{key}.npz"
