from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.distill.data import DataSplits
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.layers import (
    LayerPass,
    Layers,
    cached_layers,
    candidates_of,
    compute_layers,
    plan_pass,
    read_distances,
    write_distances,
)
from hintsearch.search.study import Study
from hintsearch.search.teacher import Teacher
from torch import nn

MATRIX = np.array([[0, 0.25], [0.25, 0]])
MEASURED = LayerDistances(
    ("layer1.0", "layer2.0"),
    {"r2_cca": MATRIX, "effective_rank": 2 * MATRIX},
    {"effective_rank": MATRIX[0]},
    430,
    {"r2_cca": np.stack([3 * MATRIX, MATRIX])},
    (16, 8),
)


def assert_same(ours: LayerDistances, theirs: LayerDistances) -> None:
    assert (ours.paths, ours.images, ours.widths) == (theirs.paths, theirs.images, theirs.widths)
    for kind in ("distances", "scores", "bootstraps"):
        mine, other = getattr(ours, kind), getattr(theirs, kind)
        assert list(mine) == list(other)
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


def test_written_distances_are_read_back(tmp_path: Path) -> None:
    write_distances(tmp_path / "distances.npz", MEASURED)
    assert_same(read_distances(tmp_path / "distances.npz"), MEASURED)


def test_written_distances_take_the_place_of_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "distances.npz"
    path.write_text("older")
    write_distances(path, MEASURED)
    assert [file.name for file in tmp_path.iterdir()] == ["distances.npz"]
    assert_same(read_distances(path), MEASURED)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(MATRIX[0].tobytes())
    path.write_bytes(content[:place] + b"\x7f" * 8 + content[place + 8 :])


def without_paths(path: Path) -> None:
    np.savez(path, images=np.array(3))


def an_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, MATRIX)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        flipped,
        without_paths,
        an_array,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 and rubbish"),
        lambda path: path.write_bytes(b"rubbish\n" * 50),
    ],
)
def test_damaged_distances_are_an_error_of_one_line(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "distances.npz"
    write_distances(path, MEASURED)
    damage(path)
    with pytest.raises(InputError) as caught:
        read_distances(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as layer metrics (")
    assert message.endswith("); remove it to compute it again")
    assert "\n" not in message


def test_candidates_are_the_blocks_of_the_network() -> None:
    found = candidates_of(ModelSpec("resnet8", 10, 1), (1, 8, 8))
    assert [candidate.path for candidate in found] == ["layer1.0", "layer2.0", "layer3.0"]


def test_candidates_are_the_paths_of_the_study() -> None:
    found = candidates_of(ModelSpec("resnet8", 10, 1), (1, 8, 8), ("layer3.0", "conv1"))
    assert [candidate.path for candidate in found] == ["conv1", "layer3.0"]


@pytest.fixture
def teacher(teacher_spec: ModelSpec, teacher_network: nn.Module, tmp_path: Path) -> Teacher:
    weights = teacher_network.state_dict()
    return Teacher(teacher_spec, weights, weights_sha256(weights), tmp_path / "teacher.safetensors", 0.9)


@pytest.fixture
def study(studied: Callable[..., Study]) -> Study:
    return studied("layers.images=128", "layers.chunk=64", "layers.actors=1", "layers.bootstraps=3")


@pytest.fixture
def layer_pass(study: Study, teacher: Teacher, splits: DataSplits) -> LayerPass:
    candidates = candidates_of(teacher.spec, splits.image_shape)
    return plan_pass(study, candidates, len(splits.train), splits.classes)


@pytest.fixture
def computed(
    shared_ray: None, cache: Path, study: Study, teacher: Teacher, splits: DataSplits, layer_pass: LayerPass
) -> Layers:
    return compute_layers(study, teacher, splits, layer_pass)


def test_computed_layers_are_found_in_the_cache_for_the_same_study_alone(
    computed: Layers, study: Study, teacher: Teacher, splits: DataSplits, studied: Callable[..., Study]
) -> None:
    """One test, for computing takes seconds."""
    cached = cached_layers(study, teacher, splits)
    assert cached is not None
    assert cached.candidates == computed.candidates
    assert_same(cached.distances, computed.distances)
    assert cached.distances.images == 128
    assert list(cached.distances.distances) == list(study.layers.metrics)
    assert {len(drawn) for drawn in cached.distances.bootstraps.values()} == {3}

    same = "layers.images=128", "layers.chunk=64", "layers.bootstraps=3"
    assert cached_layers(studied(*same, "layers.actors=2", "layers.batch=7"), teacher, splits) is not None
    for other in (
        "layers.images=129",
        "layers.chunk=32",
        "layers.bootstraps=4",
        "layers.memory_gb=1",
        "layers.metrics=[r2_cca, cka_linear, effective_rank, class_separation, procrustes]",
        "seed=1",
    ):
        assert cached_layers(studied(*same, other), teacher, splits) is None, other
    assert cached_layers(study, replace(teacher, sha256="another"), splits) is None
    assert cached_layers(study, teacher, replace(splits, mean=(0.4,))) is None


MODEL = """
from torch import nn


def network(num_classes, in_channels):
    convolution = nn.Conv2d(in_channels, {width}, 3)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(36 * {width}, num_classes))
"""


def test_candidates_are_those_of_the_code_as_it_is_now(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    channels = []
    for width in (4, 6):
        file.write_text(MODEL.format(width=width))
        first, *_ = candidates_of(ModelSpec(f"{file}:network", 10, 1), (1, 8, 8), ("0",))
        channels.append(first.channels)
    assert channels == [4, 6]


def test_empty_cache_has_no_layers(cache: Path, study: Study, teacher: Teacher, splits: DataSplits) -> None:
    assert cached_layers(study, teacher, splits) is None


def test_pass_reads_as_many_images_as_there_are(study: Study, layer_pass: LayerPass) -> None:
    assert layer_pass.plan.images == 128
    assert layer_pass.columns.channels == (8, 16, 32)
    assert layer_pass.columns.projected == 0


def test_pass_with_too_few_images_for_a_metric_is_refused(studied: Callable[..., Study], teacher: Teacher) -> None:
    candidates = candidates_of(teacher.spec, (1, 8, 8))
    with pytest.raises(InputError) as caught:
        plan_pass(studied("layers.images=63"), candidates, 150, 3)
    assert str(caught.value) == (
        "r2_cca needs at least 64 images for layers of 32 channels, but there are 63; "
        "raise layers.images or data.train_fraction, or leave r2_cca out"
    )


def test_pass_with_little_memory_projects_the_widest_layers(studied: Callable[..., Study], teacher: Teacher) -> None:
    candidates = candidates_of(teacher.spec, (1, 8, 8))
    plan = plan_pass(studied("layers.memory_gb=5e-4", "layers.chunk=16"), candidates, 150, 3)
    assert plan.columns.projected > 0
    assert plan.columns.widths[0] == min(8, max(plan.columns.widths))
    assert max(plan.memory.actor, plan.memory.driver) <= 5e5
