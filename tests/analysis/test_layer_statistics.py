from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hintsearch.analysis.layer_statistics import LayerReader, LayerSums, Matrix, merge, merge_all, sums_of_rows
from hintsearch.models.zoo import ModelSpec, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

CHANNELS, CLASSES = (3, 2), 2
COLUMNS = sum(CHANNELS) + len(CHANNELS) + CLASSES
PATHS = ("layer1.0", "layer2.0", "layer3.0")
BATCH_SIZES = (5, 4, 3)

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)
# Raw sums of squares around 1e4 keep but half of their digits.
OFFSETS = st.sampled_from([0.0, -3.0, 1e4])


def chunks_of(sizes: list[int], offset: float, seed: int) -> tuple[Matrix, list[LayerSums]]:
    rows = offset + np.random.default_rng(seed).standard_normal((sum(sizes), COLUMNS))
    bounds = np.cumsum([0, *sizes])
    parts = [rows[start:stop] for start, stop in pairwise(bounds)]
    return rows, [sums_of_rows(part, CHANNELS, CLASSES) for part in parts]


def two_pass(rows: Matrix) -> tuple[NDArray[np.longdouble], NDArray[np.longdouble]]:
    """Mean and centred moment in extended precision."""
    exact = rows.astype(np.longdouble)
    mean = exact.mean(axis=0)
    return mean, np.einsum("ni,nj->ij", exact - mean, exact - mean)


def assert_same(ours: LayerSums, count: int, mean: NDArray[np.floating], moment: NDArray[np.floating]) -> None:
    assert ours.count == count
    np.testing.assert_allclose(ours.mean, mean.astype(float), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.moment, moment.astype(float), rtol=1e-9, atol=1e-9)


@given(SIZES, OFFSETS, SEEDS)
@settings(deadline=None)
def test_merged_chunks_equal_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    rows, chunks = chunks_of(sizes, offset, seed)
    assert_same(merge_all(chunks), len(rows), *two_pass(rows))


@given(SIZES, OFFSETS, SEEDS)
@settings(deadline=None)
def test_merging_does_not_depend_on_the_order(sizes: list[int], offset: float, seed: int) -> None:
    _, chunks = chunks_of(sizes, offset, seed)
    shuffled = [chunks[i] for i in np.random.default_rng(seed).permutation(len(chunks))]
    forward, other = merge_all(chunks), merge_all(shuffled)
    assert_same(other, forward.count, forward.mean, forward.moment)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), OFFSETS, SEEDS)
@settings(deadline=None)
def test_merging_is_associative(sizes: list[int], offset: float, seed: int) -> None:
    _, (first, second, third) = chunks_of(sizes, offset, seed)
    left, right = merge(merge(first, second), third), merge(first, merge(second, third))
    assert_same(left, right.count, right.mean, right.moment)


def test_one_outlying_chunk_loses_nothing_of_the_others() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((20, COLUMNS)), 1e4 + rng.standard_normal((1, COLUMNS))])
    merged = merge(sums_of_rows(rows[:20], CHANNELS, CLASSES), sums_of_rows(rows[20:], CHANNELS, CLASSES))
    _, moment = two_pass(rows)
    np.testing.assert_allclose(merged.moment, moment.astype(float), rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, -1e4 / 3, 1e-9])
def test_constant_column_has_no_spread_at_all(value: float) -> None:
    rows = np.random.default_rng(0).standard_normal((21, COLUMNS))
    rows[:, 1] = value
    merged = merge_all([sums_of_rows(part, CHANNELS, CLASSES) for part in np.split(rows, 3)])
    assert not merged.moment[1].any()
    assert merged.mean[1] == value


def test_merge_refuses_other_layers() -> None:
    rows = np.zeros((2, COLUMNS))
    with pytest.raises(ValueError, match="different layers"):
        merge(sums_of_rows(rows, (3, 2), CLASSES), sums_of_rows(rows, (2, 3), CLASSES))


def test_merge_refuses_other_classes() -> None:
    ours = sums_of_rows(np.zeros((2, COLUMNS)), CHANNELS, CLASSES)
    other = sums_of_rows(np.zeros((2, COLUMNS + 1)), CHANNELS, CLASSES + 1)
    with pytest.raises(ValueError, match="different layers"):
        merge(ours, other)


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sums"):
        merge_all([])


def test_columns_are_the_layers_then_their_norms_then_the_labels(rows_of: Callable[..., Matrix]) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    labels = np.arange(9) % 2
    sums = sums_of_rows(rows_of([first, second], labels, 2), CHANNELS, 2)
    np.testing.assert_allclose(sums.mean[sums.layer(1)], second.mean(axis=0))
    np.testing.assert_allclose(sums.mean[sums.labels], [5 / 9, 4 / 9])
    np.testing.assert_allclose(
        sums.cross(0, 1), (first - first.mean(axis=0)).T @ (second - second.mean(axis=0)), atol=1e-12
    )


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Images of 1×8×8 with labels 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for size in BATCH_SIZES
    ]


@pytest.fixture
def network() -> nn.Module:
    """In training mode, with batch norms that know some data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(ModelSpec("resnet8", CLASSES, 1, width=0.25)).train()
        with torch.no_grad():
            network(torch.randn(64, 1, 8, 8))
        return network


def test_reader_gives_the_sums_of_what_plain_hooks_capture(
    network: nn.Module, batches: list[tuple[Tensor, Tensor]], rows_of: Callable[..., Matrix]
) -> None:
    sums = LayerReader(network, PATHS).sums(iter(batches), CLASSES)

    captured: dict[str, list[Matrix]] = {path: [] for path in PATHS}
    modules = dict(network.named_modules())
    for path in PATHS:
        modules[path].register_forward_hook(
            lambda _module, _inputs, output, path=path: captured[path].append(output.double().numpy().mean((2, 3)))
        )
    network.eval()
    with torch.no_grad():
        for images, _ in batches:
            network(images)
    layers = [np.concatenate(captured[path]) for path in PATHS]
    rows = rows_of(layers, torch.cat([labels for _, labels in batches]).numpy(), CLASSES)
    mean, moment = two_pass(rows)
    assert sums.channels == (4, 8, 16)
    assert sums.count == sum(BATCH_SIZES)
    np.testing.assert_allclose(sums.mean, mean.astype(float), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums.moment, moment.astype(float), rtol=1e-4, atol=1e-5)


def test_reader_passes_each_batch_once_for_all_layers(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    reader = LayerReader(network, PATHS)
    passed: list[int] = []
    network.register_forward_hook(lambda _module, inputs, _output: passed.append(len(inputs[0])))
    reader.sums(iter(batches), CLASSES)
    assert passed == list(BATCH_SIZES)


def test_reader_leaves_the_batch_norms_as_they_were(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    LayerReader(network, PATHS).sums(iter(batches), CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
