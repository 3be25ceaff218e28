"""Measuring layers in parallel: one Ray actor a GPU or CPU share, chunk by chunk."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from ..analysis.layer_reading import ChunkReading, LayerReader, Wanted
from ..analysis.measurement import MeasurementBuilder
from ..analysis.reading_plan import Chunk, Columns, ReadingPlan
from ..distill.allocation import keep_freed_memory
from ..distill.batches import batch_bounds
from ..distill.data import Split
from ..models.preprocessing import InputTransform, Preprocessing
from .networks import TrainedNetwork
from .ray_session import cluster_cpus, cluster_gpus, free_resources, wait_for_resources

# A chunk that brings down so many actors is not the machine's fault.
MOST_LOSSES = 3
CPU_BATCH = 64
# What a dead actor, worker or node does to a chunk that was asked for; the chunk is read again elsewhere.
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)


@dataclass(frozen=True)
class TappedNetwork:
    """A network and what is read of it.

    Attributes:
        network: with its weights.
        paths: module paths of its candidates.
    """

    network: TrainedNetwork
    paths: tuple[str, ...]


@dataclass(frozen=True)
class LayerTask:
    """What an actor needs to know; it lies once in Ray's object store.

    Attributes:
        networks: read side by side on the same images; their candidates follow one another in the sums.
        images: training images without augmentation.
        preprocessing: what a network takes that says nothing of its own.
        plan: how the images are cut.
        columns: of the sums.
        wanted: what is gathered beside the sums.
        batch: the most images of a forward pass; None: 64 on a CPU, where feature maps then stay in the cache for the
            readers, and a whole chunk on a GPU.
        on_cpu: whether it is read on the CPU even where an actor has a GPU.
    """

    networks: tuple[TappedNetwork, ...]
    images: Split
    preprocessing: Preprocessing
    plan: ReadingPlan
    columns: Columns
    wanted: Wanted
    batch: int | None
    on_cpu: bool = False


class SideBySide(nn.Module):
    """Several networks that read the same images; the candidates of the n-th are found below `n.`.

    Args:
        networks: what reads.
        transforms: of each, what makes pixels into its input.
    """

    def __init__(self, networks: Sequence[nn.Module], transforms: Sequence[InputTransform]) -> None:
        super().__init__()
        self._transforms = tuple(transforms)
        for number, network in enumerate(networks):
            self.add_module(str(number), network)

    def forward(self, pixels: torch.Tensor) -> None:
        """Uint8 [B, C, H, W]; the networks' own outputs are not wanted."""
        for network, transform in zip(self.children(), self._transforms, strict=True):
            network(transform(pixels))


class LayerWorker:
    """Reads chunks of images; runs as a Ray actor.

    One torch thread always: the result then does not depend on how many actors share a machine.
    """

    def __init__(self, task: LayerTask, on_gpu: bool = False) -> None:
        keep_freed_memory()
        torch.set_num_threads(1)
        device = torch.device("cuda" if on_gpu and not task.on_cpu else "cpu")
        transforms = [
            InputTransform(tapped.network.spec.preprocessing or task.preprocessing, device) for tapped in task.networks
        ]
        networks = SideBySide([tapped.network.build() for tapped in task.networks], transforms).to(device)
        paths = [f"{number}.{path}" for number, tapped in enumerate(task.networks) for path in tapped.paths]
        self._task, self._device = task, device
        self._reader = LayerReader(networks, paths, task.columns, task.wanted, device)

    def is_up(self) -> bool:
        """True once the network is built."""
        return True

    def read(self, chunk: Chunk, bandwidths: tuple[float, ...] | None = None) -> ChunkReading:
        """Reads a chunk in one forward pass of each image; without bandwidths, its own are measured."""
        task = self._task
        rows = np.arange(chunk.start, chunk.stop)
        pixels = torch.from_numpy(np.array(task.images.read(rows))).to(self._device)
        labels = torch.from_numpy(task.images.labels[rows]).to(self._device)
        size = task.batch or (len(rows) if self._device.type == "cuda" else CPU_BATCH)
        return self._reader.read(
            ((pixels[start:stop], labels[start:stop]) for start, stop in batch_bounds(len(rows), size)),
            chunk.anchors,
            task.plan.is_held_out(chunk.group),
            bandwidths,
        )


def count_actors(wanted: int | None, chunks: int) -> int:
    """How many actors will read: as wanted, else one a GPU, else one a CPU, at least two; never more than chunks."""
    return min(wanted or int(cluster_gpus()) or max(2, int(cluster_cpus())), chunks)


def measure_layers(
    task: LayerTask, actors: int | None = None, on_images: Callable[[int], None] | None = None
) -> MeasurementBuilder:
    """Reads every image once, whatever the number of layers and metrics.

    What is read together and the order of merging come from the task, not from the actors. The chunk of an actor that
    dies goes to another; finished ones are kept here. On return the actors are gone and their resources are free.

    Args:
        task: what to measure.
        actors: number of actors; None: one a GPU, else one a CPU, at least two.
        on_images: called with the number of images done so far.

    Returns:
        All readings, merged.

    Raises:
        ray.exceptions.RayError: a chunk failed by its own fault, or brought down three actors.
    """
    chunks = task.plan.chunks
    free_before = free_resources()
    cpus, gpus = cluster_cpus(), cluster_gpus()
    count = count_actors(actors, len(chunks))
    # A whole CPU where there is none yet: 0 would place the actors on a head that is to run nothing.
    share = {"num_cpus": min(1.0, cpus / count) or 1.0, "num_gpus": min(1.0, gpus / count) if gpus else 0}
    pool = _Pool(ray.put(task), count, share, gpus > 0)
    builder = MeasurementBuilder(task.plan, task.images.labels)
    bandwidths: tuple[float, ...] | None = None
    first, *others = range(len(chunks))
    done = 0
    try:
        # The Grams of all chunks need one bandwidth, which the first chunk gives; the other actors start meanwhile.
        for wave in [[first], others] if task.wanted.grams else [[first, *others]]:
            for position, reading in pool.readings([(p, chunks[p]) for p in wave], bandwidths):
                builder.add(position, reading)
                bandwidths = bandwidths or reading.bandwidths
                done += chunks[position].stop - chunks[position].start
                if on_images:
                    on_images(done)
    finally:
        pool.close()
    wait_for_resources(free_before)
    return builder


class _Pool:
    """Actors that read chunks. Only those that are up get work: one that died may never find a place again."""

    def __init__(self, task: Any, count: int, share: dict[str, float], on_gpu: bool) -> None:
        self._task, self._share, self._on_gpu = task, share, on_gpu
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        self._idle: deque[int] = deque()
        self._failed_starts = 0
        for place in range(count):
            self._start_actor(place)

    def readings(
        self, chunks: Sequence[tuple[int, Chunk]], bandwidths: tuple[float, ...] | None
    ) -> Iterator[tuple[int, ChunkReading]]:
        """Yields (position, reading) as they arrive; each chunk is asked for in order."""
        waiting = deque(chunks)
        running: dict[Any, tuple[int, int, Chunk]] = {}
        losses: dict[int, int] = {}

        def hand_out() -> None:
            while waiting and self._idle:
                place, (position, chunk) = self._idle.popleft(), waiting.popleft()
                running[self._actors[place].read.remote(chunk, bandwidths)] = (place, position, chunk)

        left = len(chunks)
        while left:
            hand_out()
            (reference,), _ = ray.wait([*running, *self._starting])
            if reference in self._starting:
                self._note_started(reference)
                continue
            place, position, chunk = running.pop(reference)
            try:
                reading = ray.get(reference)
            except _LOST:
                losses[position] = losses.get(position, 0) + 1
                if losses[position] >= MOST_LOSSES:
                    raise
                self._start_actor(place)
                waiting.appendleft((position, chunk))
                continue
            self._idle.append(place)
            left -= 1
            # The actor reads on while its last reading is merged.
            hand_out()
            yield position, reading

    def close(self) -> None:
        """Ends the actors at once."""
        for actor in self._actors.values():
            ray.kill(actor)

    def _start_actor(self, place: int) -> None:
        if place in self._actors:
            # It may live on if only the object was lost: two would share one GPU.
            ray.kill(self._actors[place])
        actor: Any = ray.remote(LayerWorker).options(**self._share).remote(self._task, self._on_gpu)
        self._actors[place] = actor
        self._starting[actor.is_up.remote()] = place

    def _note_started(self, reference: Any) -> None:
        place = self._starting.pop(reference)
        try:
            ray.get(reference)
        except _LOST:
            self._failed_starts += 1
            if self._failed_starts >= MOST_LOSSES:
                raise
            self._start_actor(place)
        else:
            self._idle.append(place)
