import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hintsearch.analysis.layer_statistics import LayerReader, LayerSums, merge_all
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.layer_actors import LayerTask, LayerWorker, layer_task, measure_layers
from hintsearch.search.ray_session import free_resources, wait_for_resources
from torch import nn

pytestmark = pytest.mark.usefixtures("shared_ray")

PATHS = ("layer1.0", "layer2.0", "layer3.0")
IMAGES, CHUNK = 150, 32  # five chunks, the last of 22 images
EVERYTHING = {"CPU": 4.0, "GPU": 0.0}


@pytest.fixture(scope="module")
def task(teacher_spec: ModelSpec, teacher_network: nn.Module, splits: DataSplits) -> LayerTask:
    weights = {name: tensor.numpy() for name, tensor in teacher_network.state_dict().items()}
    return layer_task(teacher_spec, weights, PATHS, splits, 1000)


@pytest.fixture(scope="module")
def in_process(teacher_network: nn.Module, splits: DataSplits) -> LayerSums:
    """The same sums without Ray: the same chunks, read one after the other."""
    reader = LayerReader(teacher_network, PATHS)
    images = DeviceImages(splits.train, splits.mean, splits.sd, torch.device("cpu"))
    batches = [(batch.images, batch.labels) for batch in images.in_order(CHUNK)]
    return merge_all([reader.sums(iter([batch]), splits.classes) for batch in batches])


@dataclass
class Measured:
    """What a call of `measure_layers` gave; `images` and `workers` are the progress and the actors alive then."""

    sums: LayerSums
    images: list[int]
    workers: list[int]
    free_after: dict[str, float]


@pytest.fixture(scope="module")
def measured(shared_ray: None, task: LayerTask) -> Callable[[int], Measured]:
    """The layers measured by so many actors, once for all tests."""
    done: dict[int, Measured] = {}

    def measure(actors: int) -> Measured:
        if actors not in done:
            wait_for_resources(EVERYTHING, 20)
            images: list[int] = []
            workers: list[int] = []

            def note(count: int) -> None:
                images.append(count)
                workers.append(len(layer_workers()))

            sums = measure_layers(task, CHUNK, actors, on_images=note)
            done[actors] = Measured(sums, images, workers, free_resources())
        return done[actors]

    return measure


def assert_same(ours: LayerSums, theirs: LayerSums) -> None:
    assert (ours.count, ours.channels, ours.classes) == (theirs.count, theirs.channels, theirs.classes)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.moment, theirs.moment, rtol=1e-9, atol=1e-9)


def layer_workers() -> list[int]:
    """Process ids of the actors that live below this process; other Ray sessions on the machine do not count."""
    parents: dict[int, int] = {}
    workers: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(b"ray::LayerWorker"):
                    workers.append(int(folder.name))
            except OSError:
                continue  # it has just ended

    def is_ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process in workers if is_ours(process)]


def wait_until_gone(seconds: float = 10) -> None:
    """Ray gives resources back a moment before the killed process has ended."""
    deadline = time.monotonic() + seconds
    while layer_workers():
        assert time.monotonic() < deadline, "actors are still alive"
        time.sleep(0.05)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_actors_give_the_sums_of_one_process(
    measured: Callable[[int], Measured], in_process: LayerSums, actors: int
) -> None:
    assert_same(measured(actors).sums, in_process)


def test_number_of_actors_changes_not_a_bit(measured: Callable[[int], Measured]) -> None:
    for actors in (2, 3):
        np.testing.assert_array_equal(measured(actors).sums.moment, measured(1).sums.moment)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_so_many_actors_work_at_once(measured: Callable[[int], Measured], actors: int) -> None:
    assert max(measured(actors).workers) == actors


def test_images_done_are_counted_up_to_all(measured: Callable[[int], Measured]) -> None:
    assert measured(1).images == [32, 64, 96, 128, 150]


def test_trap_10_resources_are_back_when_the_layers_are_measured(measured: Callable[[int], Measured]) -> None:
    assert measured(2).free_after == EVERYTHING


def test_trap_10_no_actor_is_left_when_the_layers_are_measured(measured: Callable[[int], Measured]) -> None:
    assert max(measured(2).workers) > 0
    wait_until_gone()


def test_killed_actor_changes_no_result(task: LayerTask, in_process: LayerSums) -> None:
    killed: list[int] = []

    def kill_one(_images: int) -> None:
        if not killed:
            killed.append(layer_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    sums = measure_layers(task, CHUNK, 2, on_images=kill_one)
    assert len(killed) == 1
    assert_same(sums, in_process)


def test_trap_10_failing_chunk_raises_and_leaves_no_actor(task: LayerTask) -> None:
    too_few_classes = LayerTask(**{**task.__dict__, "classes": 2})
    with pytest.raises(ray.exceptions.RayError):
        measure_layers(too_few_classes, CHUNK, 1)
    wait_for_resources(EVERYTHING, 20)
    wait_until_gone()


def test_worker_reads_its_share_of_the_images(task: LayerTask, in_process: LayerSums) -> None:
    worker = LayerWorker(task)
    bounds = [(start, min(start + CHUNK, IMAGES)) for start in range(0, IMAGES, CHUNK)]
    assert_same(merge_all([worker.sums(start, stop) for start, stop in bounds]), in_process)


@pytest.mark.parametrize(("wanted", "found"), [(40, 40), (1000, 150)])
def test_task_has_the_first_training_images(task: LayerTask, splits: DataSplits, wanted: int, found: int) -> None:
    shorter = layer_task(task.teacher, task.weights, PATHS, splits, wanted)
    assert len(shorter.images) == found
    np.testing.assert_array_equal(shorter.images.labels, splits.train.labels[:found])


def test_trap_10_waiting_for_resources_that_are_held_says_what_is_missing() -> None:
    with pytest.raises(TimeoutError) as caught:
        wait_for_resources({"CPU": 5.0, "GPU": 0.0}, seconds=0.1)
    assert str(caught.value) == (
        "after 0.1 s only 4 of 5 CPUs and 0 of 0 GPUs are free; something else runs on this Ray cluster"
    )
