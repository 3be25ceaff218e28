"""Whether the fast arithmetic costs accuracy: bf16 with a folded teacher against float32 with the teacher as it is.

    python benchmarks/precision_accuracy.py --data ROOT [--json FILE]

One teacher resnet20 is trained on 20,000 images of FashionMNIST. From it the student resnet8 learns by cross-entropy,
KD and one FitNet pair (layer2.2 to layer2.0), twice with each of 5 seeds: once in bf16 with the teacher's batch norms
folded into its convolutions, once in float32 without; order, augmentation, initial weights and schedule are the same.
Compared are the accuracies after the last epoch on the 10,000 test images, in percentage points, pair by pair. The keys
of the JSON file:

- difference_points: mean over the seeds of bf16 folded less float32 plain.
- interval_low, interval_high: its 95 % interval by Student's t.
- within_half_a_point: whether that interval lies inside ±0.5 points.
- accuracies: of each seed, in per cent.
"""

import argparse
import json
import math
import os
import statistics
import time
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

import torch
from hintsearch.distill.data import DataSpec, DataSplits, load_data
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.opening import open_batches
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.models.zoo import ModelSpec
from scipy.stats import t as student_t
from torch import nn

TEACHER, STUDENT = "resnet20", "resnet8"
HINTS = HintConfiguration(
    (HintPair("layer2.2", "layer2.0", "fitnet", 0.1),), classification_weight=1.0, logit_weight=1.0
)
TRAINING_IMAGES, ALL_IMAGES, VALIDATION_SHARE = 20_000, 60_000, 1 / 60
RECIPE = Recipe(lr=0.05, batch_size=128)
LIMIT_POINTS = 0.5


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    splits = fashion_mnist(options.data)
    fast = Execution(options.device, "bf16", fold_teacher=True)
    ways = {"bf16_folded": fast, "fp32_plain": Execution(options.device, "fp32", fold_teacher=False)}
    precision, why = best_precision(options.device)
    print(f"{len(splits.train):,} training images; the best precision here is {precision} ({why})", flush=True)
    teacher, teacher_accuracy = trained(TEACHER, splits, options.teacher_epochs, 0, fast)
    print(f"teacher {TEACHER}: {teacher_accuracy:.2f} %, {time.perf_counter() - started:.0f} s", flush=True)
    accuracies: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, execution in ways.items():
            began = time.perf_counter()
            _, accuracy = trained(STUDENT, splits, options.epochs, seed, execution, teacher)
            accuracies[name].append(accuracy)
            seconds[name].append(time.perf_counter() - began)
        told = ", ".join(f"{name} {accuracies[name][-1]:.2f} % in {seconds[name][-1]:.0f} s" for name in ways)
        print(f"seed {seed}: {told}", flush=True)
    figures = {
        **paired(accuracies["bf16_folded"], accuracies["fp32_plain"]),
        "accuracies": accuracies,
        "seconds": seconds,
        "teacher_accuracy": teacher_accuracy,
        "epochs": {"teacher": options.teacher_epochs, "student": options.epochs},
        "best_precision": [precision, why],
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
    parser.add_argument("--epochs", type=int, default=6, help="of a student (default 6)")
    parser.add_argument("--teacher-epochs", type=int, default=6, help="of the teacher (default 6)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all is run (default cpu)")
    return parser.parse_args()


def fashion_mnist(root: Path) -> DataSplits:
    """20,000 training images, 1,000 for validation, the 10,000 test images."""
    kept = round(ALL_IMAGES * (1 - VALIDATION_SHARE))
    spec = DataSpec(
        "fashion_mnist",
        root=str(root),
        validation_fraction=VALIDATION_SHARE,
        train_fraction=TRAINING_IMAGES / kept,
    )
    return load_data(spec, root)


def trained(
    name: str,
    splits: DataSplits,
    epochs: int,
    seed: int,
    execution: Execution,
    teacher: nn.Module | None = None,
) -> tuple[nn.Module, float]:
    """A network after its last epoch, and its test accuracy in per cent, both in the same arithmetic."""
    trainer = Trainer(
        ModelSpec(name, splits.classes, splits.image_shape[0]),
        splits.without_test(),
        RECIPE,
        (epochs,),
        Seeds(seed, seed),
        hints=HINTS if teacher else None,
        teacher=TeacherNetwork(teacher) if teacher else None,
        execution=execution,
    )
    for _ in trainer.epochs():
        pass
    assert splits.test is not None
    test = open_batches(splits.test, splits.preprocessing, execution.place)
    return trainer.student, 100 * evaluate(trainer.student, test, 500, execution)["accuracy"]


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
    low, high = figures["interval_low"], figures["interval_high"]
    inside = "inside" if figures["within_half_a_point"] else "not inside"
    print(
        f"bf16 folded less float32 plain: {figures['difference_points']:+.2f} points, sd {figures['difference_sd']:.2f}"
    )
    print(f"95 % interval {low:+.2f} .. {high:+.2f}: {inside} ±{LIMIT_POINTS}")


if __name__ == "__main__":
    main()
