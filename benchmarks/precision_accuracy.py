"""Whether the fast arithmetic costs accuracy: bf16 with a folded teacher against float32 with the teacher as it is.

    python benchmarks/precision_accuracy.py --data ROOT [--json FILE]

One teacher resnet20 is trained on 20,000 images of FashionMNIST. From it the student resnet8 learns by cross-entropy,
KD and one FitNet pair (layer2.2 to layer2.0), twice with each of 5 seeds: once in bf16 with the teacher's batch norms
folded into its convolutions, once in float32 without; order, augmentation, initial weights and schedule are the same.
Compared are the accuracies after the last epoch on the 50,000 images that nothing was trained on (the other 40,000
training images and the 10,000 test images: two networks that are equally good differ by 0.3 points on 10,000 images
alone), in percentage points, pair by pair. The keys of the JSON file:

- difference_points: mean over the seeds of bf16 folded less float32 plain.
- interval_low, interval_high: its 95 % interval by Student's t.
- within_half_a_point: whether that interval lies inside ±0.5 points.
- accuracies: of each seed, in per cent.
- on_test_images: the same figures of the 10,000 test images alone.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

import numpy as np
import torch
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.data import DataSpec, DataSplits, load_data
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.opening import open_batches
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.models.zoo import ModelSpec, build_model
from scipy.stats import t as student_t

TEACHER, STUDENT = "resnet20", "resnet8"
HINTS = HintConfiguration(
    (HintPair("layer2.2", "layer2.0", "fitnet", 0.1),), classification_weight=1.0, logit_weight=1.0
)
# Of 60,000.
HELD_OUT_SHARE = 2 / 3
# Of the held-out images, looked at after each epoch.
WATCHED = 1_000
RECIPE = Recipe(lr=0.05, batch_size=128)
LIMIT_POINTS = 0.5
WAYS = {"bf16_folded": ("bf16", True), "fp32_plain": ("fp32", False)}


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        name: the network.
        way: of `WAYS`.
        epochs: complete passes.
        seed: of data and weights.
        teacher: weights of the teacher; None: without one.
    """

    name: str
    way: str
    epochs: int
    seed: int
    teacher: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        weights: after the last epoch.
        on_all: accuracy on all held-out images, in per cent.
        on_test: the same on the test images.
        seconds: that training took.
    """

    weights: dict[str, torch.Tensor]
    on_all: float
    on_test: float
    seconds: float


def main() -> None:
    options = parsed_options()
    started = time.perf_counter()
    precision, why = best_precision(options.device)
    print(f"the best precision here is {precision} ({why})", flush=True)
    load(options.data)
    with ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), set_up, (options.threads,)
    ) as workers:
        first = Training(TEACHER, "bf16_folded", options.teacher_epochs, 0)
        teacher = workers.submit(train, first, options.data, options.device).result()
        print(f"teacher {TEACHER}: {teacher.on_all:.2f} %, {time.perf_counter() - started:.0f} s", flush=True)
        waiting = {
            (seed, way): workers.submit(
                train, Training(STUDENT, way, options.epochs, seed, teacher.weights), options.data, options.device
            )
            for seed in range(options.seeds)
            for way in WAYS
        }
        found: dict[str, list[Trained]] = {way: [] for way in WAYS}
        for (seed, way), future in waiting.items():
            one = future.result()
            found[way].append(one)
            print(f"seed {seed}, {way}: {one.on_all:.2f} %, {one.seconds:.0f} s", flush=True)
    accuracies = {way: [one.on_all for one in ones] for way, ones in found.items()}
    on_test = {way: [one.on_test for one in ones] for way, ones in found.items()}
    figures = {
        **paired(*accuracies.values()),
        "accuracies": accuracies,
        "on_test_images": {**paired(*on_test.values()), "accuracies": on_test},
        "seconds": {way: [one.seconds for one in ones] for way, ones in found.items()},
        "teacher_accuracy": teacher.on_all,
        "epochs": {"teacher": options.teacher_epochs, "student": options.epochs},
        "best_precision": [precision, why],
        "workers": options.workers,
        "threads": options.threads,
        "total_seconds": time.perf_counter() - started,
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", required=True, help="where torchvision's FashionMNIST is or is put"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of students (default 5)")
    parser.add_argument("--epochs", type=int, default=8, help="of a student (default 8)")
    parser.add_argument("--teacher-epochs", type=int, default=8, help="of the teacher (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="students that are trained at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all is run (default cpu)")
    return parser.parse_args()


def set_up(threads: int) -> None:
    """Sets up a worker process as a trial's is."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def load(root: Path) -> DataSplits:
    """20,000 training images, 40,000 for validation, the 10,000 test images."""
    return load_data(DataSpec("fashion_mnist", root=str(root), validation_fraction=HELD_OUT_SHARE), root)


def train(task: Training, root: Path, device: str) -> Trained:
    """Trains a network, and measures it in the same arithmetic."""
    started = time.perf_counter()
    splits = load(root)
    precision, folded = WAYS[task.way]
    execution = Execution(device, precision, fold_teacher=folded)
    teacher = None
    if task.teacher is not None:
        network = build_model(ModelSpec(TEACHER, splits.classes, splits.image_shape[0]))
        network.load_state_dict(task.teacher)
        teacher = TeacherNetwork(network)
    trainer = Trainer(
        ModelSpec(task.name, splits.classes, splits.image_shape[0]),
        replace(splits.without_test(), validation=splits.validation.subset(np.arange(WATCHED))),
        RECIPE,
        (task.epochs,),
        Seeds(task.seed, task.seed),
        hints=HINTS if teacher else None,
        teacher=teacher,
        execution=execution,
    )
    for _ in trainer.epochs():
        pass
    assert splits.test is not None
    right = {}
    for split in (splits.validation, splits.test):
        batches = open_batches(split, splits.preprocessing, execution.place)
        right[len(split)] = evaluate(trainer.student, batches, 500, execution)["accuracy"] * len(split)
    weights = {name: value.cpu() for name, value in trainer.student.state_dict().items()}
    on_test = 100 * right[len(splits.test)] / len(splits.test)
    return Trained(weights, 100 * sum(right.values()) / sum(right), on_test, time.perf_counter() - started)


def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The mean difference and where it lies with 95 % confidence."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, sd = statistics.mean(differences), statistics.stdev(differences)
    half = float(student_t.ppf(0.975, len(differences) - 1)) * sd / math.sqrt(len(differences))
    low, high = mean - half, mean + half
    return {
        "difference_points": mean,
        "difference_sd": sd,
        "interval_low": low,
        "interval_high": high,
        "within_half_a_point": max(-low, high) < LIMIT_POINTS,
    }


def show(figures: dict[str, Any]) -> None:
    print(f"\n{figures['machine']}, {figures['date']}, {figures['total_seconds'] / 60:.1f} minutes")
    print("  seed  bf16 folded  fp32 plain  difference")
    for seed, (ours, theirs) in enumerate(zip(*figures["accuracies"].values(), strict=True)):
        print(f"  {seed:4}  {ours:9.2f} %  {theirs:8.2f} %  {ours - theirs:+10.2f}")
    print("bf16 folded less float32 plain, in points:")
    for title, found in (("all held-out images", figures), ("test images alone", figures["on_test_images"])):
        inside = "inside" if found["within_half_a_point"] else "not inside"
        print(
            f"  {title:20} {found['difference_points']:+.2f}, sd {found['difference_sd']:.2f}, "
            f"95 % interval {found['interval_low']:+.2f} .. {found['interval_high']:+.2f}: {inside} ±{LIMIT_POINTS}"
        )


if __name__ == "__main__":
    main()
