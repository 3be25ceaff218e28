"""What weights for each image cost: the time of a training step with HKD beside one with fixed weights.

    python benchmarks/hkd_speed.py [--json FILE] [--device cuda]

resnet56 teaches resnet20 on random images in CIFAR-100's shape, batches of 64: cross-entropy, KD, and FitNet and SP on
the layers 2.8 → 2.2 and 3.8 → 3.2, the teacher's forward pass included, in the hardware's best precision. In each of
several rounds all ways take turns with an epoch of 20 steps, whose images per second the trainer reports; validation is
counted nowhere. The ways: fixed weights; HKD whose weight network learns in every step; HKD where it learns in every
fifth. The keys of the JSON file:

- every_step, every_fifth: time of a step over that with fixed weights, median of the rounds' ratios.
- images_per_second: of each way, median.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

import numpy as np
import torch
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import EpochResult, Seeds, TeacherNetwork, Trainer
from hintsearch.models.zoo import ModelSpec, build_model

CLASSES, BATCH, STEPS = 100, 64, 20
PAIRS = tuple(
    HintPair(theirs, ours, loss, 1.0)
    for theirs, ours in (("layer2.8", "layer2.2"), ("layer3.8", "layer3.2"))
    for loss in ("fitnet", "sp")
)
FIXED = "fixed"
WAYS = {
    FIXED: None,
    "every_step": DynamicWeights(warmup_fraction=0.0),
    "every_fifth": DynamicWeights(meta_every=5, warmup_fraction=0.0),
}
# Far off, so that no schedule ends.
RUNGS = (1_000_000,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=9, help="epochs of each way (default 9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--precision", choices=("best", "fp32"), default="best", help="of both networks (default best)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all is run (default cpu)")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    precision = best_precision(options.device)[0] if options.precision == "best" else "fp32"
    trainings = {way: training(settings, Execution(options.device, precision)) for way, settings in WAYS.items()}
    # Not timed: buffers are allocated, kernels chosen.
    for epochs in trainings.values():
        next(epochs)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, epochs in trainings.items():
            speeds[way].append(next(epochs).metrics["images_per_second"])
    figures: dict[str, Any] = {
        way: statistics.median(fixed / own for fixed, own in zip(speeds[FIXED], speeds[way], strict=True))
        for way in WAYS
        if way != FIXED
    }
    figures |= {
        "images_per_second": {way: statistics.median(found) for way, found in speeds.items()},
        "rounds": options.rounds,
        "precision": precision,
        "threads": options.threads,
        "device": options.device,
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def training(settings: DynamicWeights | None, execution: Execution) -> Iterator[EpochResult]:
    """The epochs of a student with these weights."""
    rng = np.random.default_rng(0)

    def images(count: int) -> ImageSet:
        labels = np.arange(count, dtype=np.int64) % CLASSES
        return ImageSet(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), labels)

    splits = DataSplits(images(STEPS * BATCH), images(CLASSES), None, CLASSES, (0.5,) * 3, (0.25,) * 3, images(1000))
    hints = HintConfiguration(PAIRS, logit_weight=1.0, dynamic_weights=settings)
    trainer = Trainer(
        ModelSpec("resnet20", CLASSES, 3),
        splits,
        Recipe(batch_size=BATCH),
        RUNGS,
        Seeds(),
        hints=hints,
        teacher=TeacherNetwork(build_model(ModelSpec("resnet56", CLASSES, 3))),
        execution=execution,
    )
    return trainer.epochs()


def show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['machine']}, {figures['date']}; {figures['device']}, {figures['precision']}, "
        f"{figures['threads']} threads, {figures['rounds']} rounds"
    )
    print("  weights                  images/s   time of a step")
    names = {FIXED: "fixed", "every_step": "HKD, meta_every: 1", "every_fifth": "HKD, meta_every: 5"}
    for way, speed in figures["images_per_second"].items():
        print(f"  {names[way]:22} {speed:10.0f}   {figures.get(way, 1.0):13.2f}×")


if __name__ == "__main__":
    main()
