import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hintsearch.analysis.layer_metrics import layer_distances, metric_names, what_they_read
from hintsearch.analysis.layer_reading import LayerReader
from hintsearch.analysis.measurement import LayerMeasurement, MeasurementBuilder
from hintsearch.analysis.reading_plan import plan_columns, plan_reading
from hintsearch.distill.data import DataSplits
from hintsearch.distill.image_folders import read_image_folder
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.distill.lazy_images import Decoding, LazyImages
from hintsearch.distill.opening import open_batches
from hintsearch.models.candidates import Candidate, list_candidates
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.layer_actors import LayerTask, LayerWorker, TappedNetwork, count_actors, measure_layers
from hintsearch.search.networks import TrainedNetwork
from hintsearch.search.ray_session import free_resources, wait_for_resources
from image_files import write_class_folders
from torch import nn

pytestmark = pytest.mark.usefixtures("shared_ray")

PATHS = ("layer1.0", "layer2.0", "layer3.0")
IMAGES = 150
EVERYTHING = {"CPU": 4.0, "GPU": 0.0}


@pytest.fixture(scope="module")
def candidates(teacher_network: nn.Module) -> tuple[Candidate, ...]:
    return list_candidates(teacher_network, (1, 8, 8))


@pytest.fixture(scope="module")
def task(
    teacher_spec: ModelSpec, teacher_network: nn.Module, splits: DataSplits, candidates: tuple[Candidate, ...]
) -> LayerTask:
    """All metrics of three layers on 150 images, in 16 chunks of 9 or 10."""
    return LayerTask(
        (TappedNetwork(trained(teacher_spec, teacher_network), PATHS),),
        splits.train,
        splits.preprocessing,
        plan_reading(IMAGES, 32),
        plan_columns([candidate.channels for candidate in candidates], splits.classes, 32, 1e9, seed=0),
        what_they_read(metric_names()),
        None,
    )


@pytest.fixture(scope="module")
def in_process(
    task: LayerTask, teacher_network: nn.Module, splits: DataSplits, candidates: tuple[Candidate, ...]
) -> LayerMeasurement:
    """The same measurement without Ray: the same chunks, read one after the other."""
    reader = LayerReader(teacher_network, PATHS, task.columns, task.wanted, torch.device("cpu"))
    images = open_batches(splits.train, splits.preprocessing, torch.device("cpu"))
    (everything,) = images.in_order(IMAGES)
    builder = MeasurementBuilder(task.plan, splits.train.labels)
    bandwidths: tuple[float, ...] | None = None
    for position, chunk in enumerate(task.plan.chunks):
        part = slice(chunk.start, chunk.stop)
        batch = everything.images[part], everything.labels[part]
        reading = reader.read([batch], chunk.anchors, task.plan.is_held_out(chunk.group), bandwidths)
        bandwidths = reading.bandwidths
        builder.add(position, reading)
    reader.close()
    return builder.measurement(candidates)


def trained(spec: ModelSpec, network: nn.Module) -> TrainedNetwork:
    return TrainedNetwork(spec, {name: tensor.numpy() for name, tensor in network.state_dict().items()})


@dataclass
class Measured:
    """What a call of `measure_layers` gave; `images` and `workers` are the progress and the actors alive then."""

    measurement: LayerMeasurement
    images: list[int]
    workers: list[int]
    free_after: dict[str, float]


@pytest.fixture(scope="module")
def measured(shared_ray: None, task: LayerTask, candidates: tuple[Candidate, ...]) -> Callable[[int], Measured]:
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

            measurement = measure_layers(task, actors, on_images=note).measurement(candidates)
            done[actors] = Measured(measurement, images, workers, free_resources())
        return done[actors]

    return measure


def assert_same(ours: LayerMeasurement, theirs: LayerMeasurement) -> None:
    """Every layer metric agrees, which read all that a measurement holds."""
    found, wanted = (layer_distances(measurement, metric_names()) for measurement in (ours, theirs))
    for name, matrix in wanted.distances.items():
        np.testing.assert_allclose(found.distances[name], matrix, rtol=1e-6, atol=1e-7, err_msg=name)
    for ours_group, their_group in zip(ours.groups, theirs.groups, strict=True):
        np.testing.assert_allclose(ours_group.sums.moment, their_group.sums.moment, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("actors", [1, 2, 5])
def test_actors_give_the_measurement_of_one_process(
    measured: Callable[[int], Measured], in_process: LayerMeasurement, actors: int
) -> None:
    assert_same(measured(actors).measurement, in_process)


def test_number_of_actors_changes_not_a_bit(measured: Callable[[int], Measured]) -> None:
    one = measured(1).measurement
    for actors in (2, 5):
        other = measured(actors).measurement
        for ours, theirs in zip(one.groups, other.groups, strict=True):
            np.testing.assert_array_equal(ours.sums.moment, theirs.sums.moment)
            np.testing.assert_array_equal(ours.alignment, theirs.alignment)
        for ours_rows, their_rows in zip(one.anchors + one.held_out, other.anchors + other.held_out, strict=True):
            np.testing.assert_array_equal(ours_rows, their_rows)


@pytest.mark.parametrize("actors", [1, 2, 5])
def test_never_more_actors_than_wanted_are_at_work(measured: Callable[[int], Measured], actors: int) -> None:
    assert 1 <= max(measured(actors).workers) <= actors


def test_images_done_are_counted_up_to_all(measured: Callable[[int], Measured], task: LayerTask) -> None:
    assert measured(1).images == [chunk.stop for chunk in task.plan.chunks]


def test_trap_10_resources_are_back_when_the_layers_are_measured(measured: Callable[[int], Measured]) -> None:
    assert measured(2).free_after == EVERYTHING


def test_trap_10_no_actor_is_left_when_the_layers_are_measured(measured: Callable[[int], Measured]) -> None:
    assert max(measured(2).workers) > 0
    wait_until_gone()


LOGGING_NETWORK = """
import os
import time
import torch
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.zoo import ModelSpec, build_model


class Logging(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        with open({log!r}, "a") as log:
            log.write(f"{{os.getpid()}} {{images.sum().item():.6f}}\\n")
        time.sleep(0.3)  # so that the other actor is up before all is read
        return self.network(images)


def net(num_classes, in_channels):
    return Logging(build_model(ModelSpec("resnet8", num_classes, in_channels, width=0.5)))
"""


def test_killed_actor_changes_no_result_and_costs_its_own_chunk_only(
    task: LayerTask, teacher_network: nn.Module, in_process: LayerMeasurement, tmp_path: Path
) -> None:
    log = tmp_path / "forward.log"
    factory = tmp_path / "logging_network.py"
    factory.write_text(LOGGING_NETWORK.format(log=str(log)))
    weights = {f"network.{name}": tensor.numpy() for name, tensor in teacher_network.state_dict().items()}
    network = TrainedNetwork(ModelSpec(f"{factory}:net", 3, 1), weights)
    logged = replace(task, networks=(TappedNetwork(network, tuple(f"network.{path}" for path in PATHS)),))
    killed: list[int] = []

    def kill_one(_images: int) -> None:
        # Once both have read: a chunk of either is then in flight.
        at_work = {line.split()[0] for line in log.read_text().splitlines()}
        if not killed and len(at_work) == 2:
            killed.append(int(min(at_work)))
            os.kill(killed[0], signal.SIGKILL)

    measurement = measure_layers(logged, 2, on_images=kill_one).measurement(in_process.candidates)
    passes = [line.split() for line in log.read_text().splitlines()]
    assert_same(measurement, in_process)
    assert len(killed) == 1
    # Every chunk has its own pixel sum: all were read, and at most the one in flight twice.
    assert len({pixels for _, pixels in passes}) == len(task.plan.chunks)
    assert len(passes) <= len(task.plan.chunks) + 1


def test_trap_10_failing_chunk_raises_and_leaves_no_actor(task: LayerTask) -> None:
    too_few_classes = replace(task, columns=replace(task.columns, classes=2))
    with pytest.raises(ray.exceptions.RayError):
        measure_layers(too_few_classes, 1)
    wait_for_resources(EVERYTHING, 20)
    wait_until_gone()


def test_worker_sends_no_features_that_nobody_reads(task: LayerTask) -> None:
    worker = LayerWorker(replace(task, wanted=what_they_read(["cka_linear"])))
    reading = worker.read(task.plan.chunks[-1])
    assert (len(reading.anchors), len(reading.held_out), reading.bandwidths) == (0, 0, ())


def test_forward_passes_of_another_size_give_the_same(task: LayerTask) -> None:
    first = task.plan.chunks[0]
    whole, parts = (LayerWorker(replace(task, batch=batch)).read(first) for batch in (None, 3))
    np.testing.assert_allclose(whole.statistics.sums.moment, parts.statistics.sums.moment, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole.statistics.zeros, parts.statistics.zeros)


def test_split_that_is_decoded_when_it_is_read_gives_what_one_in_memory_gives(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=20)
    source = read_image_folder(tmp_path).train
    assert isinstance(source, ImageFiles)
    lazy = LazyImages(source, Decoding((8, 8)))
    spec = ModelSpec("resnet8", 3, 3, width=0.25)
    network = build_model(spec)
    channels = [candidate.channels for candidate in list_candidates(network, (3, 8, 8))]
    plan = plan_reading(60, 32)
    one, other = (
        LayerWorker(
            LayerTask(
                (TappedNetwork(trained(spec, network), PATHS),),
                images,
                Preprocessing((0.5,) * 3, (0.25,) * 3),
                plan,
                plan_columns(channels, 3, 32, 1e9, seed=0),
                what_they_read(["cka_linear"]),
                None,
            )
        ).read(plan.chunks[-1])
        for images in (lazy, lazy.decoded(workers=1))
    )
    np.testing.assert_array_equal(one.statistics.sums.moment, other.statistics.sums.moment)


def test_networks_side_by_side_read_as_each_alone(
    task: LayerTask, splits: DataSplits, in_process: LayerMeasurement, candidates: tuple[Candidate, ...]
) -> None:
    spec = ModelSpec("resnet8", 3, 1, width=0.25)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = build_model(spec)
    theirs = list_candidates(student, (1, 8, 8))
    both = replace(
        task,
        networks=(*task.networks, TappedNetwork(trained(spec, student), PATHS)),
        columns=plan_columns([c.channels for c in (*candidates, *theirs)], splits.classes, 32, 1e9, seed=0),
    )
    sums = measure_layers(both, 2).measurement((*candidates, *theirs)).evidence().sums
    alone = in_process.evidence().sums
    width = sum(alone.channels)
    np.testing.assert_allclose(sums.moment[:width, :width], alone.moment[:width, :width], rtol=1e-5, atol=1e-6)
    assert sums.channels == (*alone.channels, *(c.channels for c in theirs))


@pytest.mark.parametrize(("wanted", "chunks", "found"), [(None, 16, 4), (3, 16, 3), (None, 2, 2), (5, 3, 3)])
def test_there_is_an_actor_a_cpu_but_never_more_than_chunks(wanted: int | None, chunks: int, found: int) -> None:
    assert count_actors(wanted, chunks) == found


@ray.remote(num_cpus=1)
class Holder:
    def is_up(self) -> bool:
        return True


def test_trap_10_waiting_for_resources_that_are_held_says_what_is_missing() -> None:
    wait_for_resources(EVERYTHING, 20)
    holder = Holder.remote()
    assert ray.get(holder.is_up.remote())
    with pytest.raises(TimeoutError) as caught:
        wait_for_resources(EVERYTHING, seconds=0.1)
    ray.kill(holder)
    assert str(caught.value) == (
        "after 0.1 s only 3 of 4 CPUs and 0 of 0 GPUs are free; something else runs on this Ray cluster"
    )


def test_resources_that_no_node_has_any_more_are_not_waited_for() -> None:
    wait_for_resources({"CPU": 5.0, "GPU": 1.0}, seconds=20)
    assert free_resources() == EVERYTHING
