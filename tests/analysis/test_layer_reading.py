import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hintsearch.analysis.kernel_alignment import gaussian_gram, stacked_hsic
from hintsearch.analysis.layer_reading import ChunkReading, LayerReader, Wanted
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.reading_plan import Columns
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import ModelSpec, build_model
from made_layers import rows_of
from scipy.spatial.distance import pdist
from torch import Tensor, nn

PATHS = ("layer1.0", "layer2.0", "layer3.0")
CHANNELS, CLASSES, IMAGES = (16, 32, 64), 3, 23
COLUMNS = Columns(CHANNELS, CHANNELS, CLASSES, 0)
PROJECTED = Columns(CHANNELS, (16, 20, 20), CLASSES, 0)
CPU = torch.device("cpu")
EVERYTHING = Wanted(zeros=True, grams=True, anchors=True, held_out=True)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Images of 1×8×8 with labels 0 to 2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 1, 8, 8, generator=generator), torch.randint(0, CLASSES, (IMAGES,), generator=generator)


@pytest.fixture
def network() -> nn.Module:
    """In training mode, with batch norms that know some data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(ModelSpec("resnet8", CLASSES, 1)).train()
        with torch.no_grad():
            network(torch.randn(64, 1, 8, 8))
        return network


def batches(images: tuple[Tensor, Tensor], *sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(torch.split(part, list(sizes)) for part in images), strict=True)


def read(
    network: nn.Module,
    images: tuple[Tensor, Tensor],
    columns: Columns = COLUMNS,
    wanted: Wanted = EVERYTHING,
    sizes: tuple[int, ...] = (10, 9, 4),
    anchors: int = 0,
    held_out: bool = False,
    bandwidths: tuple[float, ...] | None = None,
) -> ChunkReading:
    return LayerReader(network, PATHS, columns, wanted, CPU).read(
        batches(images, *sizes), anchors, held_out, bandwidths
    )


def alignment_of(reading: ChunkReading) -> Matrix:
    assert reading.statistics.alignment is not None
    return reading.statistics.alignment


def maps_by_hand(network: nn.Module, images: Tensor) -> list[Matrix]:
    """Feature maps that plain hooks capture, all images at once."""
    captured: dict[str, Matrix] = {}
    modules = dict(network.named_modules())

    def capture(path: str, output: Tensor) -> None:
        captured[path] = output.double().numpy().copy()

    handles = [
        modules[path].register_forward_hook(lambda _module, _inputs, output, path=path: capture(path, output))
        for path in PATHS
    ]
    with torch.no_grad():
        network.eval()(images)
    for handle in handles:
        handle.remove()
    return [captured[path] for path in PATHS]


def pooled_by_hand(network: nn.Module, images: Tensor) -> list[Matrix]:
    return [maps.mean(axis=(2, 3)) for maps in maps_by_hand(network, images)]


def features_by_hand(network: nn.Module, images: Tensor, columns: Columns) -> list[Matrix]:
    """Pooled features, projected where the columns say so."""
    pooled = pooled_by_hand(network, images)
    projections = [columns.projection(layer) for layer in range(len(pooled))]
    return [x if projection is None else x @ projection for x, projection in zip(pooled, projections, strict=True)]


def assert_sums_of(reading: ChunkReading, rows: Matrix) -> None:
    sums = reading.statistics.sums
    assert sums.count == len(rows)
    np.testing.assert_allclose(sums.mean, rows.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums.moment, np.cov(rows.T, bias=True) * len(rows), rtol=1e-4, atol=1e-5)


def test_sums_are_those_of_what_plain_hooks_capture(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    reading = read(network, images)
    assert reading.statistics.sums.channels == CHANNELS
    assert_sums_of(reading, rows_of(pooled_by_hand(network, images[0]), images[1].numpy(), CLASSES))


@pytest.mark.parametrize("sizes", [(23,), (1,) * 23, (20, 3)])
def test_batches_of_another_size_give_the_same(
    network: nn.Module, images: tuple[Tensor, Tensor], sizes: tuple[int, ...]
) -> None:
    ours = read(network, images, anchors=11, held_out=True)
    other = read(network, images, sizes=sizes, anchors=11, held_out=True)
    np.testing.assert_allclose(ours.statistics.sums.mean, other.statistics.sums.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.statistics.sums.moment, other.statistics.sums.moment, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.anchors, other.anchors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.held_out, other.held_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.bandwidths, other.bandwidths, rtol=1e-5)
    np.testing.assert_allclose(alignment_of(ours), alignment_of(other), rtol=1e-4)
    np.testing.assert_array_equal(ours.statistics.zeros, other.statistics.zeros)


def test_norms_are_those_of_the_pooled_features(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    expected = [np.linalg.norm(layer, axis=1).sum() for layer in pooled_by_hand(network, images[0])]
    for columns in (COLUMNS, PROJECTED):
        np.testing.assert_allclose(read(network, images, columns).statistics.norms, expected, rtol=1e-6)


def kill(network: nn.Module, path: str, channel: int) -> None:
    """Makes a channel of the block's output 0 for every image."""

    def cut(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        keep = torch.ones(output.shape[1])
        keep[channel] = 0
        return output * keep[:, None, None]

    network.get_submodule(path).register_forward_hook(cut)


@pytest.mark.parametrize("columns", [COLUMNS, PROJECTED])
def test_a_channel_that_is_always_0_has_not_fired(
    network: nn.Module, images: tuple[Tensor, Tensor], columns: Columns
) -> None:
    kill(network, "layer2.0", 5)
    fired = read(network, images, columns).statistics.fired
    expected = np.concatenate([layer.any(axis=0) for layer in pooled_by_hand(network, images[0])])
    assert not expected[16 + 5]
    np.testing.assert_array_equal(fired, expected)


def test_zeros_are_counted_exactly(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    # Batch norms shift half of the activations below 0, and the blocks end with a rectifier; -1 is not 0 either.
    network.get_submodule("layer3.0").register_forward_hook(lambda _module, _inputs, output: -output)
    expected = [np.count_nonzero(maps == 0) for maps in maps_by_hand(network, images[0])]
    assert min(expected) > 100
    found = read(network, images, sizes=(23,)).statistics.zeros
    np.testing.assert_array_equal(found, expected)


def test_zeros_are_not_counted_if_they_are_not_wanted(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    assert read(network, images, wanted=Wanted(grams=True)).statistics.zeros is None


def test_projected_columns_are_the_pooled_features_times_the_projection(
    network: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    features = features_by_hand(network, images[0], PROJECTED)
    assert [layer.shape[1] for layer in features] == [16, 20, 20]
    reading = read(network, images, PROJECTED, anchors=4)
    # The norm columns are those of the projected features, as debiased CKA needs them.
    assert_sums_of(reading, rows_of(features, images[1].numpy(), CLASSES))
    assert reading.statistics.sums.channels == (16, 20, 20)
    np.testing.assert_allclose(reading.anchors, np.concatenate(features, axis=1)[:4], rtol=1e-5, atol=1e-6)


def test_anchors_are_the_first_images(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    expected = np.concatenate(pooled_by_hand(network, images[0]), axis=1)[:12]
    np.testing.assert_allclose(read(network, images, anchors=12).anchors, expected, rtol=1e-5, atol=1e-6)


def test_held_out_features_are_those_of_all_images(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    expected = np.concatenate(pooled_by_hand(network, images[0]), axis=1)
    np.testing.assert_allclose(read(network, images, held_out=True).held_out, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_were_not_asked_for_are_not_kept(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    reading = read(network, images)
    assert reading.anchors.shape == reading.held_out.shape == (0, sum(CHANNELS))


def test_rows_that_are_not_wanted_are_not_kept(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    reading = read(network, images, wanted=Wanted(zeros=True, grams=True), anchors=12, held_out=True)
    assert reading.anchors.shape == reading.held_out.shape == (0, sum(CHANNELS))


@pytest.mark.parametrize("columns", [COLUMNS, PROJECTED])
@pytest.mark.parametrize("given_widths", [None, (0.5, 1.5, 2.5)])
def test_alignment_is_that_of_gaussian_grams_of_the_columns_at_these_bandwidths(
    network: nn.Module, images: tuple[Tensor, Tensor], columns: Columns, given_widths: tuple[float, ...] | None
) -> None:
    reading = read(network, images, columns, bandwidths=given_widths)
    features = features_by_hand(network, images[0], columns)
    widths = given_widths or tuple(float(np.median(pdist(layer))) for layer in features)
    np.testing.assert_allclose(reading.bandwidths, widths, rtol=1e-5)
    grams = [gaussian_gram(torch.from_numpy(x), width) for x, width in zip(features, widths, strict=True)]
    np.testing.assert_allclose(alignment_of(reading), stacked_hsic(torch.stack(grams)).numpy(), rtol=1e-4)
    assert reading.statistics.minibatches == 1


def test_without_grams_there_is_neither_alignment_nor_bandwidth(
    network: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    reading = read(network, images, wanted=Wanted())
    assert reading.statistics.alignment is None
    assert reading.statistics.minibatches == 0
    assert reading.bandwidths == ()


def test_each_batch_passes_once_for_all_layers(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    passed: list[int] = []
    network.register_forward_hook(lambda _module, inputs, _output: passed.append(len(inputs[0])))
    read(network, images, sizes=(10, 9, 4))
    assert passed == [10, 9, 4]


def test_a_reader_reads_one_chunk_after_the_other(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    reader = LayerReader(network, PATHS, COLUMNS, EVERYTHING, CPU)
    reader.read(batches((images[0] * 3, images[1]), 23))
    again = reader.read(batches(images, 10, 9, 4))
    expected = read(network, images)
    np.testing.assert_array_equal(again.statistics.sums.moment, expected.statistics.sums.moment)


def test_batch_norms_stay_as_they_were(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    read(network, images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_closed_reader_leaves_no_tap(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    before = {path: len(module._forward_hooks) for path, module in network.named_modules()}
    reader = LayerReader(network, PATHS, COLUMNS, EVERYTHING, CPU)
    reader.close()
    assert {path: len(module._forward_hooks) for path, module in network.named_modules()} == before


def test_no_feature_map_outlives_its_batch(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    made: list[weakref.ref[Tensor]] = []
    for path in PATHS:
        network.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output: made.append(weakref.ref(output))
        )
    alive: list[int] = []

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(images, 10, 9, 4):
            alive.append(sum(feature() is not None for feature in made))
            yield batch

    LayerReader(network, PATHS, COLUMNS, EVERYTHING, CPU).read(watched())
    assert len(made) == 9
    assert alive == [0, 0, 0]


def test_an_unknown_path_names_the_nearest(network: nn.Module) -> None:
    with pytest.raises(InputError, match="did you mean 'layer1\\.0'"):
        LayerReader(network, ("layer1.O",), Columns((16,), (16,), CLASSES, 0), EVERYTHING, CPU)
