"""What measuring a teacher's layers costs beside the forward pass that it needs anyway.

Compares, in the same run and chunk by chunk in turn:

- a bare eval forward pass of resnet56 on CIFAR-100-sized images, the same pass with all metrics that come from sums,
  and with all metrics: same module, weights, dtype, memory format, threads and resident batches; only taps and sums
  differ.
  Reading, merging and turning the sums into matrices are all counted; bootstraps are shown apart.
- the same for torchvision's ResNet-50 at 224×224 and all metrics, its wide layers projected.
- unbiased linear CKA of all pairs of resnet110's 54 candidates on one minibatch, features given: one pair after the
  other, as the package torch_cka does it, against stacked Grams.

Also shown: seconds against images, Ray actors and candidates. Images are random: only time is measured.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
from hintsearch.analysis.kernel_alignment import linear_grams, stacked_hsic
from hintsearch.analysis.layer_metrics import layer_distances, metric_names, what_they_read
from hintsearch.analysis.layer_reading import LayerReader
from hintsearch.analysis.layer_scores import SCORES
from hintsearch.analysis.measurement import LayerMeasurement, MeasurementBuilder
from hintsearch.analysis.pairwise_metrics import PAIRWISE
from hintsearch.analysis.reading_plan import ReadingPlan, plan_columns, plan_reading
from hintsearch.distill.data import ImageSet
from hintsearch.models.candidates import Candidate, list_candidates
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.taps import LayerTaps
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.layer_actors import CPU_BATCH, LayerTask, TappedNetwork, measure_layers
from hintsearch.search.networks import TrainedNetwork
from hintsearch.search.ray_session import ray_session
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

MEMORY = 4e9
BOOTSTRAPS = 20
PAIRWISE_ROUNDS = 7
LIMITS = {
    "sums_over_forward": 1.10,
    "all_over_forward": 1.35,
    "resnet50_over_forward": 1.25,
    "pairwise_loop_over_ours": 100,
}


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    figures: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "threads": options.threads,
        "device": options.device,
    }
    console = Console(width=130)
    figures |= resnet56(options, console)
    figures |= resnet50(options, console)
    figures |= pairwise(options, console)
    figures |= scaling(options, console)
    show_limits(figures, console)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--images", type=int, default=10_000, help="for resnet56 (default 10,000)")
    parser.add_argument("--large-images", type=int, default=960, help="for ResNet-50 (default 960)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each comparison is made (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each way (default 1, as an actor has)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    return parser.parse_args()


class Way:
    """One way of reading the same chunks: its own copy of the network, with or without taps.

    Args:
        model: the network, copied.
        candidates: what is read.
        plan: how the images are cut.
        metrics: layer metrics to be made; empty for the bare pass.
        classes: number of classes.
        device: where it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: tuple[Candidate, ...],
        plan: ReadingPlan,
        metrics: Sequence[str],
        classes: int,
        device: torch.device,
    ) -> None:
        self.seconds = 0.0
        self._model, self._plan, self._metrics, self._candidates = copy.deepcopy(model), plan, metrics, candidates
        self._device = device
        self._reader = None
        if metrics:
            largest = max(chunk.stop - chunk.start for chunk in plan.chunks)
            columns = plan_columns([candidate.channels for candidate in candidates], classes, largest, MEMORY, 0)
            paths = [candidate.path for candidate in candidates]
            self._reader = LayerReader(self._model, paths, columns, what_they_read(metrics), device)
        self._bandwidths: tuple[float, ...] | None = None
        self._builder = MeasurementBuilder(plan, np.zeros(plan.images, dtype=np.int64))

    def start(self, labels: np.ndarray[Any, Any]) -> None:
        """Begins a new round."""
        self.seconds, self._bandwidths = 0.0, None
        self._builder = MeasurementBuilder(self._plan, labels)

    def read(self, position: int, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Reads one chunk and merges it."""
        started = self._now()
        if self._reader is None:
            with torch.no_grad():
                for images, _ in batches:
                    self._model(images)
        else:
            chunk = self._plan.chunks[position]
            held_out = self._plan.is_held_out(chunk.group)
            reading = self._reader.read(batches, chunk.anchors, held_out, self._bandwidths)
            self._bandwidths = reading.bandwidths
            self._builder.add(position, reading)
        self.seconds += self._now() - started

    def finish(self) -> LayerMeasurement | None:
        """Turns what was read into matrices."""
        if self._reader is None:
            return None
        started = self._now()
        measurement = self._builder.measurement(self._candidates)
        layer_distances(measurement, self._metrics)
        self.seconds += self._now() - started
        return measurement

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def compared(
    model: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    images: int,
    chunk: int,
    batch: int,
    metrics: dict[str, tuple[str, ...]],
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], LayerMeasurement]:
    """Seconds of each way in each round; the ways take turns at every chunk."""
    device = torch.device(options.device)
    model = calibrated(model, shape).eval().to(device)
    candidates = list_candidates(model, shape)
    plan = plan_reading(images, chunk)
    ways = {name: Way(model, candidates, plan, chosen, classes, device) for name, chosen in metrics.items()}
    # A few chunks are resident and are read again and again: only time is measured.
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(chunk, *shape, generator=generator).to(device)
    labels = torch.randint(classes, (images,), generator=generator)
    for way in ways.values():
        way.read(0, [(pool[:batch], labels[:batch].to(device))])  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    measured: LayerMeasurement | None = None
    for _ in range(options.rounds):
        for way in ways.values():
            way.start(labels.numpy())
        for position, part in enumerate(plan.chunks):
            noise = pool + 0.1 * torch.randn(shape, generator=generator).to(device)
            starts = range(0, part.stop - part.start, batch)
            batches = [
                (
                    noise[s : min(s + batch, part.stop - part.start)],
                    labels[part.start : part.stop][s : s + batch].to(device),
                )
                for s in starts
            ]
            names = list(ways)
            for name in names[position % len(names) :] + names[: position % len(names)]:
                ways[name].read(position, batches)
        for name, way in ways.items():
            measured = way.finish() or measured
            seconds[name].append(way.seconds)
    assert measured is not None
    return seconds, measured


def calibrated(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The untrained network with batch-norm statistics of some images, so that activations keep their scale."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, *shape))
    return model


def from_sums() -> tuple[str, ...]:
    """All metrics that read nothing but sums and the network."""
    return tuple(entry.name for entry in (*PAIRWISE, *SCORES) if entry.facts["reads"] in ("sums", "network"))


def resnet56(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The bare pass, metrics from sums, all metrics."""
    ways = {"bare": (), "sums": from_sums(), "all": metric_names()}
    model = build_model(ModelSpec("resnet56", 100, 3))
    seconds, measured = compared(model, (3, 32, 32), 100, options.images, 256, CPU_BATCH, ways, options)
    started = time.perf_counter()
    layer_distances(measured, metric_names(), BOOTSTRAPS)
    bootstraps = time.perf_counter() - started
    table = Table(title=f"resnet56, 27 layers, {options.images:,} images of 3×32×32, {options.threads} thread(s)")
    for column in ("way", "metrics", "median seconds", "over the bare pass: median", "of rounds"):
        table.add_column(column)
    add_ways(table, ways, seconds)
    table.add_row(f"{BOOTSTRAPS} bootstraps of all metrics", str(len(metric_names())), f"{bootstraps:.1f}", "", "")
    console.print(table)
    return {
        "sums_over_forward": median_ratio(seconds["sums"], seconds["bare"]),
        "all_over_forward": median_ratio(seconds["all"], seconds["bare"]),
        "resnet56_seconds": seconds,
        "bootstraps_seconds": bootstraps,
    }


def resnet50(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The bare pass and all metrics, at 224×224."""
    from torchvision.models import resnet50 as torchvision_resnet50

    ways = {"bare": (), "all": metric_names()}
    model = torchvision_resnet50(weights=None)
    seconds, measured = compared(model, (3, 224, 224), 1000, options.large_images, 256, 16, ways, options)
    widths = measured.groups[0].sums.channels
    channels = sum(candidate.channels for candidate in measured.candidates)
    table = Table(
        title=f"ResNet-50, 16 layers, {channels:,} channels in {sum(widths):,} columns, "
        f"{options.large_images:,} images of 3×224×224"
    )
    for column in ("way", "metrics", "median seconds", "over the bare pass: median", "of rounds"):
        table.add_column(column)
    add_ways(table, ways, seconds)
    console.print(table)
    return {
        "resnet50_over_forward": median_ratio(seconds["all"], seconds["bare"]),
        "resnet50_seconds": seconds,
        "resnet50_columns": sum(widths),
    }


def add_ways(table: Table, ways: dict[str, tuple[str, ...]], seconds: dict[str, list[float]]) -> None:
    for name, metrics in ways.items():
        ratios = [ours / bare for ours, bare in zip(seconds[name], seconds["bare"], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        median = f"{statistics.median(ratios):.3f}×"
        table.add_row(name, str(len(metrics)), f"{statistics.median(seconds[name]):.1f}", median, shown)


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def pairwise(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Unbiased linear CKA of all pairs of 54 layers on one minibatch of 256 images of 8×8.

    The figure is that of pooled features, which layer metrics read; flattened maps are shown beside it.
    """
    maps = features_of("resnet110", (3, 8, 8), 256, torch.device(options.device))
    given = {"pooled": [feature.mean(dim=(2, 3)) for feature in maps], "flattened maps": maps}
    table = Table(title=f"Unbiased linear CKA of all pairs of {len(maps)} layers, one minibatch of 256, features given")
    for column in ("features", "pair by pair", "stacked Grams", "loop over ours: median", "of rounds", "difference"):
        table.add_column(column)
    found: dict[str, Any] = {}
    for name, features in given.items():
        stacked(features)  # warms up
        loop_seconds, our_seconds = [], []
        for _ in range(PAIRWISE_ROUNDS):
            loop_seconds.append(timed(lambda features=features: pair_by_pair(features), options.device))
            # Many at once: one is over before the clock is exact.
            our_seconds.append(
                timed(lambda features=features: [stacked(features) for _ in range(20)], options.device) / 20
            )
        ratios = [loop / ours for loop, ours in zip(loop_seconds, our_seconds, strict=True)]
        # In float64: in float32 the loop itself is off by more.
        exact = [feature.double() for feature in features]
        difference = float((pair_by_pair(exact) - stacked(exact)).abs().max())
        found[name] = {"ratio": statistics.median(ratios), "difference": difference}
        table.add_row(
            name,
            f"{statistics.median(loop_seconds):.2f} s",
            f"{1000 * statistics.median(our_seconds):.1f} ms",
            f"{statistics.median(ratios):.0f}×",
            ", ".join(f"{value:.0f}" for value in ratios),
            f"{difference:.0e}",
        )
    console.print(table)
    return {"pairwise_loop_over_ours": found["pooled"]["ratio"], "pairwise": found}


def features_of(name: str, shape: tuple[int, int, int], images: int, device: torch.device) -> list[Tensor]:
    """Feature maps of all candidates of a network of the zoo, for random images."""
    model = calibrated(build_model(ModelSpec(name, 100, shape[0])), shape).eval().to(device)
    with LayerTaps(model, [candidate.path for candidate in list_candidates(model, shape)]) as taps, torch.no_grad():
        model(torch.randn(images, *shape, device=device))
        return taps.take()


def pair_by_pair(features: list[Tensor]) -> Tensor:
    """CKA [L, L] in the order of torch_cka: Grams and estimators made anew for every pair."""

    def hsic(first: Tensor, second: Tensor) -> Tensor:
        size = len(first)
        same = torch.trace(first @ second)
        totals = first.sum() * second.sum() / ((size - 1) * (size - 2))
        rows = first.sum(dim=0) @ second.sum(dim=1) * 2 / (size - 2)
        return (same + totals - rows) / (size * (size - 3))

    def gram(feature: Tensor) -> Tensor:
        flat = feature.flatten(1)
        return (flat @ flat.t()).fill_diagonal_(0.0)

    result = features[0].new_zeros(len(features), len(features))
    for row, first in enumerate(features):
        ours = gram(first)
        own = hsic(ours, ours)
        for column, second in enumerate(features):
            theirs = gram(second)
            result[row, column] = hsic(ours, theirs) / (own.sqrt() * hsic(theirs, theirs).sqrt())
    return result


def stacked(features: list[Tensor]) -> Tensor:
    """CKA [L, L] by stacked Grams, in the features' own precision."""
    alignment = stacked_hsic(linear_grams(features))
    scale = alignment.diagonal().sqrt()
    return alignment / scale[:, None] / scale[None, :]


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def scaling(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Seconds of the layer pass by Ray actors against images, actors and candidates; medians of rounds in turn."""
    spec = ModelSpec("resnet56", 100, 3)
    every = tuple(candidate.path for candidate in list_candidates(build_model(spec), (3, 32, 32)))
    # (images, actors, candidates)
    cases = [(1024, 1, every), (2048, 1, every), (4096, 1, every), (4096, 2, every)]
    cases += [(4096, 1, every[step - 1 :: step]) for step in (9, 3)]
    seconds: list[list[float]] = [[] for _ in cases]
    with ray_session(None):
        actor_seconds(spec, every, 512, 1)  # starts Ray's workers
        for _ in range(options.rounds):
            for times, (images, actors, paths) in zip(seconds, cases, strict=True):
                times.append(actor_seconds(spec, paths, images, actors))
    rows = [
        {"images": images, "actors": actors, "candidates": len(paths), "seconds": statistics.median(times)}
        for times, (images, actors, paths) in zip(seconds, cases, strict=True)
    ]
    table = Table(title="The layer pass of resnet56 by Ray actors, all metrics, actors' start left out")
    for column in ("images", "actors", "candidates", "seconds", "images a second"):
        table.add_column(column, justify="right")
    for row in rows:
        speed = f"{row['images'] / row['seconds']:.0f}"
        table.add_row(f"{row['images']:,}", str(row["actors"]), str(row["candidates"]), f"{row['seconds']:.1f}", speed)
    console.print(table)
    return {"scaling": rows}


def actor_seconds(spec: ModelSpec, paths: tuple[str, ...], images: int, actors: int) -> float:
    """Seconds of the second half of the images, when all actors are up, times two."""
    rng = np.random.default_rng(0)
    model = calibrated(build_model(spec), (3, 32, 32))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    candidates = list_candidates(model, (3, 32, 32), paths)
    data = ImageSet(
        rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8), rng.integers(0, 100, images, dtype=np.int64)
    )
    plan = plan_reading(images, 256)
    columns = plan_columns([candidate.channels for candidate in candidates], 100, 256, MEMORY, 0)
    task = LayerTask(
        (TappedNetwork(TrainedNetwork(spec, weights), paths),),
        data,
        Preprocessing((0.5,) * 3, (0.25,) * 3),
        plan,
        columns,
        what_they_read(metric_names()),
        None,
    )
    marks: list[tuple[int, float]] = []
    measure_layers(task, actors, on_images=lambda done: marks.append((done, time.perf_counter())))
    (first, began), (last, ended) = marks[len(marks) // 2], marks[-1]
    return (ended - began) * images / (last - first)


def show_limits(figures: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Wanted and found, {figures['machine']}, {figures['date']}")
    for column in ("figure", "wanted", "found"):
        table.add_column(column)
    for name, limit in LIMITS.items():
        sign = "≥" if name == "pairwise_loop_over_ours" else "≤"
        table.add_row(name, f"{sign} {limit:g}×", f"{figures[name]:.3f}×")
    console.print(table)


if __name__ == "__main__":
    main()
