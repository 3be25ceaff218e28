"""How fast students are trained, beside a plain loop and beside the fastest that this hardware could do it.

    python benchmarks/train_speed.py [--json FILE] [--device cuda] [--compile] [--quick]

Random images in CIFAR-100's shape, batches of 64, cross-entropy + KD + one FitNet pair, two pairs of networks:
resnet56 → resnet20 (hint from layer2.8 to layer2.2) and resnet32x4 → resnet8x4 (layer2.4 to layer2.0). In each of
several rounds all ways take turns with a short block of steps, each after steps that are not timed:

- plain: `plain_loop.py`, a loop as the field writes it, in a process of its own where all but the number of threads is
  as torch has it, with 2 worker processes that are started outside of timing and idle, their batches ready, while
  another way is timed.
- ours: an epoch of GroupTrainer as a trial runs it, with order, augmentation, schedule and history; in the hardware's
  best precision, with the folded teacher. Validation is counted nowhere.
- floor: the very same teacher pass and training step on one batch that is there already.
- the same in other precisions and with the teacher unfolded; with --compile also by torch.compile.

Images per second are those of the median block. The keys of the JSON file:

- over_plain_resnet20, over_plain_resnet8x4: ours over plain, images per second, of each pair.
- of_floor: ours over floor, of the pair where it is lower.
- four_students_over_one: resnet32x4 → resnet8x4; images per second and student of four in a group, side by side
  with a torch thread each, over those of one alone with all threads: how much sooner four are ready than by four
  separate runs. The table also has the group trained in turn, each student with all threads.
- augment_images_per_second: of reading an epoch of 50,000 images, shuffled, cropped, flipped and normalised.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from platform import machine, python_version
from typing import Any

import numpy as np
import torch
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.batches import Augmentation, DeviceImages
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import GroupTrainer, TaughtStudent, TeacherNetwork
from hintsearch.models.zoo import ModelSpec, build_model
from plain_loop import WORKERS, PlainLoop, calibrate
from torch import nn

CLASSES, IMAGES, BATCH = 100, 50_000, 64
MEAN, SD, LR = (0.5,) * 3, (0.25,) * 3, 0.05
STUDENTS = 4
# Far off, so that no schedule ends.
RUNGS = (1_000_000,)
# As many as the plain loop's workers have ready.
WARM_UP = 2 * WORKERS
TARGETS = {
    "over_plain_resnet20": 2.5,
    "over_plain_resnet8x4": 2.0,
    "of_floor": 0.90,
    "four_students_over_one": 1.6,
    "augment_images_per_second": 40_000,
}


@dataclass(frozen=True)
class Pair:
    """Two networks and the hint between them.

    Attributes:
        teacher: its name.
        student: its name.
        teacher_layer: where the hint is from.
        student_layer: where it goes to.
        stage: the same layers, counted as the plain loop does.
        slowness: blocks are shorter by this factor.
    """

    teacher: str
    student: str
    teacher_layer: str
    student_layer: str
    stage: int
    slowness: float

    @property
    def hints(self) -> HintConfiguration:
        """KD and one FitNet pair."""
        pair = HintPair(self.teacher_layer, self.student_layer, "fitnet", 1.0)
        return HintConfiguration((pair,), classification_weight=1.0, logit_weight=1.0)

    def __str__(self) -> str:
        return f"{self.teacher} → {self.student}"


PAIRS = (
    Pair("resnet56", "resnet20", "layer2.8", "layer2.2", stage=2, slowness=1.0),
    Pair("resnet32x4", "resnet8x4", "layer2.4", "layer2.0", stage=2, slowness=2.2),
)


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        images: of a block, counted once for each student.
        warm_up: what comes before each block.
        block: what is timed.
        rest: waits until nothing goes on in the background.
        close: ends what it holds.
        peak_bytes: on a GPU, the most that the last block took; None: ask this process.
    """

    images: int
    warm_up: Callable[[], None]
    block: Callable[[], object]
    rest: Callable[[], None] = nothing
    close: Callable[[], None] = nothing
    peak_bytes: Callable[[], int] | None = None


class PlainProcess:
    """A `PlainLoop` in a process of its own, so that nothing that our command line sets changes it.

    Args:
        pair: the networks; their weights and the images are those of the other ways.
        device: where it runs.
        threads: of torch.
    """

    def __init__(self, pair: Pair, device: torch.device, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_plain_loop, args=(theirs, pair, device, threads))
        self._process.start()
        theirs.close()
        # That all is built.
        self.peak_bytes = self._pipe.recv()

    def train(self, steps: int) -> None:
        """Trains for some steps, and waits for them."""
        self._pipe.send(steps)
        self.peak_bytes = self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(0)
        self._process.join()


def serve_plain_loop(pipe: Connection, pair: Pair, device: torch.device, threads: int) -> None:
    """Trains for as many steps as are received, until none are wanted; sends the bytes that they took on a GPU."""
    torch.set_num_threads(threads)
    data = random_images(IMAGES)
    images = np.ascontiguousarray(data.images.transpose(0, 2, 3, 1))
    loop = PlainLoop(*networks_of(pair), pair.stage, images, data.labels, MEAN, SD, BATCH, LR, device)
    pipe.send(0)
    while steps := pipe.recv():
        before = memory_now(device)
        loop.train(steps)
        pipe.send(peak_since(before, device))
    loop.close()


def plain_way(pair: Pair, steps: int, device: torch.device, threads: int) -> Way:
    process = PlainProcess(pair, device, threads)
    return Way(
        steps * BATCH,
        lambda: process.train(WARM_UP),
        lambda: process.train(steps),
        # Much longer than the workers need for the batches that they make ahead.
        lambda: time.sleep(0.5),
        process.close,
        lambda: process.peak_bytes,
    )


def trainer_of(
    pair: Pair,
    teacher: nn.Module,
    data: ImageSet,
    steps: int,
    execution: Execution,
    students: int = 1,
    side_by_side: int = 1,
) -> GroupTrainer:
    """A trainer whose epochs have some steps."""
    unused = data.subset(np.arange(2))
    return GroupTrainer(
        ModelSpec(pair.student, CLASSES, 3),
        DataSplits(data.subset(np.arange(steps * BATCH)), unused, None, CLASSES, MEAN, SD),
        Recipe(lr=LR, batch_size=BATCH),
        RUNGS,
        [TaughtStudent(pair.hints, seed) for seed in range(students)],
        data_seed=0,
        teacher=TeacherNetwork(teacher),
        execution=execution,
        side_by_side=side_by_side,
    )


def trial_way(trainer: GroupTrainer, steps: int) -> Way:
    """Epochs as a trial runs them, up to where it waits for the device."""
    epochs = itertools.count(1)
    return Way(
        steps * BATCH * len(trainer.networks),
        bare_steps(trainer, WARM_UP),
        lambda: trainer._train_epoch(next(epochs)).cpu(),
        close=trainer.close,
    )


def with_threads(way: Way, threads: int, usual: int) -> Way:
    """The way with another number of torch threads for each student."""

    def block() -> None:
        torch.set_num_threads(threads)
        way.block()
        torch.set_num_threads(usual)

    return Way(way.images, way.warm_up, block, way.rest, way.close)


def floor_way(trainer: GroupTrainer, steps: int) -> Way:
    """The same on one batch."""
    return Way(steps * BATCH * len(trainer.networks), bare_steps(trainer, WARM_UP), bare_steps(trainer, steps))


def bare_steps(trainer: GroupTrainer, steps: int) -> Callable[[], None]:
    """Steps with what the trainer has made, on one batch."""
    (batch,) = trainer._train.fixed_batches(1, BATCH, 0)
    teacher, trainings = trainer._teacher, trainer._trainings
    assert teacher is not None

    def run() -> None:
        for _ in range(steps):
            taught = teacher(batch.teacher_images)
            for training in trainings:
                training.step(batch, taught, LR)

    return run


@dataclass
class Measured:
    """What the blocks of one way gave.

    Attributes:
        speeds: images per second of each block.
        peak_bytes: the most that a block took on the device beside what was there before it; None on a CPU.
        first_seconds: of the first warm-up, in which a compiled network is compiled.
    """

    speeds: list[float]
    peak_bytes: int | None
    first_seconds: float

    @property
    def speed(self) -> float:
        """Of the median block."""
        return statistics.median(self.speeds)

    @property
    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "images_per_second": self.speed,
            "of_blocks": self.speeds,
            "peak_bytes": self.peak_bytes,
            "first_warm_up_seconds": self.first_seconds,
        }


def main() -> None:
    options = parsed_options()
    # As our command line does, and every trial.
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    precision, why = best_precision(options.device)
    best = Execution(options.device, precision)
    data = random_images(IMAGES)
    figures: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": options.threads,
        "precision": precision,
        "precision_because": why,
        "load_average_before": os.getloadavg(),
    }
    print(f"{figures['machine']}, {options.threads} threads, {figures['device']}; {precision} ({why})")
    pairs = {str(pair): measured_pair(pair, data, best, options) for pair in PAIRS}
    for pair in PAIRS:
        figures[f"over_plain_{pair.student}"] = ratio(pairs[str(pair)], "ours", "plain")
    figures["of_floor"] = min(ratio(ways, "ours", "floor") for ways in pairs.values())
    group = measured_group(PAIRS[1], data, best, options)
    figures["four_students_over_one"] = ratio(group, "group", "alone")
    figures["augment_images_per_second"] = augmentation_speed(data, torch.device(options.device), options.rounds)
    figures["load_average_after"] = os.getloadavg()
    measured = {**pairs, f"{PAIRS[1]}, {STUDENTS} students": group}
    figures["ways"] = {title: {name: way.figures for name, way in ways.items()} for title, ways in measured.items()}
    show_targets(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all ways run (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each way (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each way (default 5)")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, and the time it takes")
    parser.add_argument("--quick", action="store_true", help="two rounds of a few steps, to see that all works")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    return options


def random_images(count: int) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, CLASSES, count, dtype=np.int64))


def block_steps(pair: Pair, options: argparse.Namespace) -> int:
    """Steps of a timed block."""
    usual = 6 if options.quick else 24
    # A GPU is through with so few before the clock is exact.
    faster = 6 if options.device == "cuda" else 1
    return max(4, round(usual * faster / pair.slowness))


def measured_pair(pair: Pair, data: ImageSet, best: Execution, options: argparse.Namespace) -> dict[str, Measured]:
    """All ways of one student."""
    steps = block_steps(pair, options)
    teacher, _ = networks_of(pair)
    ours = trainer_of(pair, teacher, data, steps, best)
    ways = {
        "plain": plain_way(pair, max(4, round(0.7 * steps)), best.place, options.threads),
        "ours": trial_way(ours, steps),
        "floor": floor_way(ours, steps),
    }
    # No figure hangs on these.
    fewer = max(4, round(0.7 * steps))
    for name, execution in variants(best, options.compile).items():
        ways[name] = trial_way(trainer_of(pair, teacher, data, fewer, execution), fewer)
    measured = take_turns(ways, options.rounds, best.place)
    show(f"{pair}, {best.precision}, folded teacher where not said otherwise", measured, "plain")
    return measured


def variants(best: Execution, compiled: bool) -> dict[str, Execution]:
    """What else the trainer can do, to be compared with the best."""

    def execution(precision: str, fold: bool) -> Execution:
        return Execution(best.device, precision, fold_teacher=fold)

    found = {"teacher unfolded": execution(best.precision, False)}
    # Without hardware for it, bf16 is emulated and takes minutes.
    if best.precision != "fp32":
        found |= {"fp32": execution("fp32", True), "fp32, teacher unfolded": execution("fp32", False)}
    if compiled:
        modes = ("default", "reduce-overhead") if best.device == "cuda" else ("default",)
        found |= {f"compiled, {mode}": Execution(best.device, best.precision, mode) for mode in modes}
    return found


def measured_group(pair: Pair, data: ImageSet, best: Execution, options: argparse.Namespace) -> dict[str, Measured]:
    """One student with all threads; several one after the other, and side by side with the same threads in all."""
    teacher, _ = networks_of(pair)
    steps = block_steps(pair, options)
    ways = {
        "alone": trial_way(trainer_of(pair, teacher, data, steps, best), steps),
        "group in turn": trial_way(trainer_of(pair, teacher, data, steps, best, STUDENTS), steps),
    }
    if best.device == "cpu":
        side_by_side = trial_way(
            trainer_of(pair, teacher, data, steps, best, STUDENTS, min(STUDENTS, options.threads)), steps
        )
        ways["group"] = with_threads(side_by_side, max(1, options.threads // STUDENTS), options.threads)
    else:
        ways["group"] = ways.pop("group in turn")
    measured = take_turns(ways, options.rounds, best.place)
    show(f"{pair}, one student and {STUDENTS}: images counted once for each student", measured, "alone")
    return measured


def networks_of(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with the weights that all ways start from."""
    torch.manual_seed(0)
    teacher, student = (build_model(ModelSpec(name, CLASSES, 3)) for name in (pair.teacher, pair.student))
    calibrate(teacher, torch.randn(256, 3, 32, 32))
    return teacher, student


def take_turns(ways: dict[str, Way], rounds: int, device: torch.device) -> dict[str, Measured]:
    """Times one block of each way in each round, each round beginning with another, and closes the ways."""
    measured = {name: Measured([], None, timed(way.warm_up, device)) for name, way in ways.items()}
    for way in ways.values():
        way.rest()
    names = list(ways)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            add_block(measured[name], ways[name], device)
    for way in ways.values():
        way.close()
    return measured


def add_block(measured: Measured, way: Way, device: torch.device) -> None:
    way.warm_up()
    before = memory_now(device)
    measured.speeds.append(way.images / timed(way.block, device))
    if device.type == "cuda":
        peak = way.peak_bytes() if way.peak_bytes else peak_since(before, device)
        measured.peak_bytes = max(measured.peak_bytes or 0, peak)
    way.rest()


def memory_now(device: torch.device) -> int:
    """Bytes that this process holds on a GPU; the peak is counted anew from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(before: int, device: torch.device) -> int:
    """The most bytes that this process held on a GPU beside those before."""
    return torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0


def augmentation_speed(data: ImageSet, device: torch.device, rounds: int) -> float:
    """Images per second of reading an epoch; the median of some epochs."""
    images = DeviceImages(data, DataSplits(data, data, None, CLASSES, MEAN, SD).preprocessing, device)

    def read(epoch: int) -> None:
        for _ in images.epoch(epoch, BATCH, 0, Augmentation()):
            pass

    read(0)
    seconds = [timed(partial(read, epoch), device) for epoch in range(1, rounds + 1)]
    return len(data) / statistics.median(seconds)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until all is done, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(ways: dict[str, Measured], ours: str, theirs: str) -> float:
    return ways[ours].speed / ways[theirs].speed


def show(title: str, ways: dict[str, Measured], base: str) -> None:
    rows = [
        (
            name,
            f"{way.speed:.0f}",
            f"{ratio(ways, name, base):.2f}×",
            f"{min(way.speeds):.0f} .. {max(way.speeds):.0f}",
            "" if way.peak_bytes is None else f"{way.peak_bytes / 2**20:.0f} MiB",
            f"{way.first_seconds:.1f} s",
        )
        for name, way in ways.items()
    ]
    columns = ("way", "images/s", f"over {base}", "of blocks", "peak memory", f"first {WARM_UP} steps")
    print_table(title, columns, rows)


def show_targets(figures: dict[str, Any]) -> None:
    rows = [(key, f"≥ {target:,g}", f"{figures[key]:,.4g}") for key, target in TARGETS.items()]
    print_table(f"Wanted and found, {figures['date']}", ("figure", "wanted", "found"), rows)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints aligned columns; empty ones are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in kept]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = (row[i].ljust(width) if i == 0 else row[i].rjust(width) for i, width in zip(kept, widths, strict=True))
        print("  " + "  ".join(cells))


if __name__ == "__main__":
    main()
