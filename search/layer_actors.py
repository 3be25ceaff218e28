"""Measuring the teacher's layers in parallel: one Ray actor a GPU or CPU share, chunk by chunk."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ..analysis.layer_statistics import LayerReader, LayerSums, merge_all
from ..distill.batches import DeviceImages
from ..distill.data import DataSplits, ImageSet
from ..models.weights import apply_weights
from ..models.zoo import ModelSpec, build_model
from .ray_session import cluster_cpus, cluster_gpus, free_resources, wait_for_resources

# A chunk that brings down so many actors is not the machine's fault.
MOST_LOSSES = 3


@dataclass(frozen=True)
class LayerTask:
    """What an actor needs to know.

    Attributes:
        teacher: the network.
        weights: its state dict as arrays.
        paths: module paths of the candidates.
        images: training images without augmentation.
        mean: channel means used to normalise.
        sd: channel standard deviations used to normalise.
        classes: number of classes.
    """

    teacher: ModelSpec
    weights: dict[str, NDArray[Any]]
    paths: tuple[str, ...]
    images: ImageSet
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    classes: int


class LayerWorker:
    """Computes the sums of chunks of images; runs as a Ray actor.

    One torch thread always: the result then does not depend on how many actors share a machine.
    """

    def __init__(self, task: LayerTask, on_gpu: bool = False) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if on_gpu else "cpu")
        teacher = build_model(task.teacher)
        weights = {name: torch.from_numpy(array.copy()) for name, array in task.weights.items()}
        apply_weights(teacher, weights, task.teacher.name)
        self._task, self._device = task, device
        self._reader = LayerReader(teacher.to(device), task.paths)

    def sums(self, start: int, stop: int) -> LayerSums:
        """Sums over the images start .. stop−1, in one forward pass of each."""
        images = self._task.images.subset(np.arange(start, stop))
        batches = DeviceImages(images, self._task.mean, self._task.sd, self._device).in_order(stop - start)
        return self._reader.sums(((batch.images, batch.labels) for batch in batches), self._task.classes)


def layer_task(
    teacher: ModelSpec, weights: dict[str, NDArray[Any]], paths: tuple[str, ...], splits: DataSplits, images: int
) -> LayerTask:
    """The task for the first `images` training images; fewer if there are no more."""
    chosen = splits.train.subset(np.arange(min(images, len(splits.train))))
    return LayerTask(teacher, weights, paths, chosen, splits.mean, splits.sd, splits.classes)


def measure_layers(
    task: LayerTask, chunk: int, actors: int | None = None, on_images: Callable[[int], None] | None = None
) -> LayerSums:
    """Reads every image once, whatever the number of layers and metrics.

    Chunk boundaries and the order of merging come from the arguments, not from the actors. The chunk of an actor that
    dies goes to another. On return the actors are gone and their resources are free.

    Args:
        task: what to measure.
        chunk: images a call.
        actors: number of actors; None: one a GPU, else one a CPU, at least two.
        on_images: called with the number of images done so far.

    Raises:
        ray.exceptions.RayError: a chunk failed by its own fault, or brought down three actors.
    """
    cpus, gpus = cluster_cpus(), cluster_gpus()
    free_before = free_resources()
    count = actors or max(2, int(gpus or cpus))
    images = len(task.images)
    bounds = [(start, min(start + chunk, images)) for start in range(0, images, chunk)]
    count = min(count, len(bounds))
    # A whole CPU where there is none yet: 0 would place the actors on a head that is to run nothing.
    share = {"num_cpus": min(1.0, cpus / count) or 1.0, "num_gpus": min(1.0, gpus / count) if gpus else 0}
    reference = ray.put(task)

    def make_actor() -> Any:
        return ray.remote(LayerWorker).options(**share).remote(reference, gpus > 0)

    pool = [make_actor() for _ in range(count)]
    try:
        results = dict(_finished_chunks(pool, make_actor, bounds, on_images))
    finally:
        for actor in pool:
            ray.kill(actor)
    wait_for_resources(free_before)
    return merge_all([results[position] for position in range(len(bounds))])


def _finished_chunks(
    pool: list[Any],
    make_actor: Callable[[], Any],
    bounds: list[tuple[int, int]],
    on_images: Callable[[int], None] | None,
) -> Iterator[tuple[int, LayerSums]]:
    """Yields (position of the chunk, its sums) as they arrive; replaces dead actors in `pool`."""
    waiting = deque(range(len(bounds)))
    running: dict[Any, tuple[int, int]] = {}
    losses = dict.fromkeys(range(len(bounds)), 0)
    done = 0

    def start(place: int) -> None:
        if waiting:
            position = waiting.popleft()
            running[pool[place].sums.remote(*bounds[position])] = (place, position)

    for place in range(len(pool)):
        start(place)
    while running:
        (reference,), _ = ray.wait(list(running))
        place, position = running.pop(reference)
        try:
            sums = ray.get(reference)
        except ray.exceptions.RayActorError:
            losses[position] += 1
            if losses[position] >= MOST_LOSSES:
                raise
            pool[place] = make_actor()
            waiting.appendleft(position)
        else:
            done += sums.count
            if on_images:
                on_images(done)
            yield position, sums
        start(place)
