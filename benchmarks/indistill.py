"""What InDistill gains over its main stage alone, and over cross-entropy: retrieval on FashionMNIST.

    python benchmarks/indistill.py --data ROOT [--json FILE]

20,000 training images; a chain of networks as in the published CIFAR-10 experiment: a large teacher (resnet20, by
cross-entropy) teaches the auxiliary network Cnn32 by PKT on the penultimate features; the student Cnn32_Small then
learns in three ways with each of 3 seeds, which decide initial weights, order and augmentation:

- cross_entropy: from labels alone.
- pkt: by PKT on the penultimate features of the auxiliary network alone.
- indistill: the same after a warm-up of 3, 4 and 5 epochs, shallow to deep, on those channels of the auxiliary
  network's three layers that have the strongest filters. The warm-up's epochs are taken from the main stage's: all
  three are trained for as many epochs.

Adam at 1e-3, then at 1e-4 for the last seventh of the epochs; images of 32×32, cropped and flipped. After the last
epoch the training images are ranked for each test image by the penultimate features. The keys of the JSON file:

- map_cosine, map_l2: exact mean average precision in per cent, of each way and seed.
- map11_cosine, map11_l2: the published 11-point form; precision_at_100_cosine, precision_at_100_l2: of the first 100.
- over_pkt, over_cross_entropy: InDistill less the other way in map_cosine, mean and sd over the seeds, pair by pair.
- as_published: whether the means of map_cosine are in the published order, InDistill, PKT alone, cross-entropy.
"""

import argparse
import json
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
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.opening import open_batches
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.retrieval import retrieval
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.distill.warmup import Warmup
from hintsearch.models.penultimate import classifier_path
from hintsearch.models.zoo import ModelSpec, build_model

LARGE, AUXILIARY, STUDENT = "resnet20", "Cnn32", "Cnn32_Small"
WARMUP = Warmup(base_epochs=2)
PAIRS = tuple(HintPair(layer, layer, "mse", 0.0) for layer in ("pool1", "pool2", "pool3"))
LABELS = HintConfiguration()
PKT = HintConfiguration(classification_weight=0.0, embedding_weight=1.0, embedding_loss="pkt_symmetric")
INDISTILL = HintConfiguration(
    PAIRS, classification_weight=0.0, embedding_weight=1.0, embedding_loss="pkt_symmetric", warmup=WARMUP
)
WAYS = {"cross_entropy": LABELS, "pkt": PKT, "indistill": INDISTILL}
LAST_PART = 1 / 7
# Of the images held out for validation, looked at after each epoch.
WATCHED = 1_000
FIGURES = ("map_cosine", "map_l2", "map11_cosine", "map11_l2", "precision_at_100_cosine", "precision_at_100_l2")


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        name: the network.
        hints: what it learns by.
        epochs: complete passes, those of the warm-up included.
        seed: of data and weights.
        taught_by: name of its teacher; empty: none.
        teacher: weights of the teacher.
        alone: whether no other is trained at the time, so that it may have the threads of all.
    """

    name: str
    hints: HintConfiguration
    epochs: int
    seed: int
    taught_by: str = ""
    teacher: dict[str, torch.Tensor] | None = None
    alone: bool = False


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        weights: after the last epoch.
        scores: of the rankings, in per cent.
        seconds: that training and ranking took.
    """

    weights: dict[str, torch.Tensor]
    scores: dict[str, float]
    seconds: float


def main() -> None:
    options = parsed_options()
    started = time.perf_counter()
    precision, why = best_precision(options.device)
    print(f"training in {precision} ({why})", flush=True)
    load(options.data)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), keep_freed_memory) as workers:

        def submit(task: Training) -> Any:
            threads = options.threads * (options.workers if task.alone else 1)
            return workers.submit(train, task, options.data, options.device, threads)

        large: Trained = submit(Training(LARGE, LABELS, options.teacher_epochs, 0, alone=True)).result()
        print(f"{LARGE}: {line(large)}", flush=True)
        auxiliary: Trained = submit(
            Training(AUXILIARY, PKT, options.epochs, 0, LARGE, large.weights, alone=True)
        ).result()
        print(f"{AUXILIARY}: {line(auxiliary)}", flush=True)
        waiting = {
            (way, seed): submit(Training(STUDENT, hints, options.epochs, seed, AUXILIARY, auxiliary.weights))
            for seed in range(options.seeds)
            for way, hints in WAYS.items()
        }
        found: dict[str, list[Trained]] = {way: [] for way in WAYS}
        for (way, seed), future in waiting.items():
            found[way].append(future.result())
            print(f"{STUDENT}, {way}, seed {seed}: {line(found[way][-1])}", flush=True)
    figures = figures_of(found) | {
        "teachers": {LARGE: large.scores, AUXILIARY: auxiliary.scores},
        "epochs": {"large": options.teacher_epochs, "auxiliary": options.epochs, "student": options.epochs},
        "precision": [precision, why],
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
    parser.add_argument("--seeds", type=int, default=3, help="students of each way (default 3)")
    parser.add_argument("--epochs", type=int, default=35, help="of auxiliary network and student (default 35)")
    parser.add_argument("--teacher-epochs", type=int, default=8, help="of the large teacher (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="networks that are trained at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all is run (default cpu)")
    return parser.parse_args()


def load(root: Path) -> DataSplits:
    """20,000 training images, of the other 40,000 a few for validation, the 10,000 test images; 32×32."""
    splits = load_data(DataSpec("fashion_mnist", root=str(root), size=32, validation_fraction=2 / 3), root)
    return replace(splits, validation=splits.validation.subset(np.arange(WATCHED)))


def train(task: Training, root: Path, device: str, threads: int) -> Trained:
    """Trains a network and ranks the training images for the test images."""
    started = time.perf_counter()
    torch.set_num_threads(threads)
    splits = load(root)
    teacher = None
    if task.teacher is not None and task.hints.needs_teacher:
        network = build_model(ModelSpec(task.taught_by, splits.classes, splits.image_shape[0]))
        network.load_state_dict(task.teacher)
        teacher = TeacherNetwork(network)
    before = task.hints.warmup.total_epochs(len(PAIRS)) if task.hints.warmup else 0
    epochs = task.epochs - before
    recipe = Recipe(
        lr=1e-3,
        optimizer="adam",
        weight_decay=0.0,
        batch_size=128,
        schedule="step",
        milestones=(1 - LAST_PART * task.epochs / epochs,),
        decay=0.1,
    )
    execution = Execution(device, best_precision(device)[0])
    spec = ModelSpec(task.name, splits.classes, splits.image_shape[0])
    trainer = Trainer(
        spec,
        splits.without_test(),
        recipe,
        (epochs,),
        Seeds(task.seed, task.seed),
        hints=task.hints,
        teacher=teacher,
        execution=execution,
    )
    for _ in trainer.epochs():
        pass
    assert splits.test is not None
    database, queries = (
        open_batches(split, splits.preprocessing, execution.place) for split in (splits.train, splits.test)
    )
    classifier = classifier_path(trainer.student, splits.image_shape)
    scores = retrieval(trainer.student, classifier, database, queries, 500, execution)
    weights = {name: value.cpu() for name, value in trainer.student.state_dict().items()}
    return Trained(weights, {name: 100 * value for name, value in scores.items()}, time.perf_counter() - started)


def figures_of(found: dict[str, list[Trained]]) -> dict[str, Any]:
    """What the JSON file holds of the students."""
    figures: dict[str, Any] = {
        name: {way: [one.scores[name] for one in ones] for way, ones in found.items()} for name in FIGURES
    }
    ours = figures["map_cosine"]["indistill"]
    for other in ("pkt", "cross_entropy"):
        gains = [a - b for a, b in zip(ours, figures["map_cosine"][other], strict=True)]
        figures[f"over_{other}"] = {"mean": statistics.mean(gains), "sd": spread(gains), "gains": gains}
    means = {way: statistics.mean(values) for way, values in figures["map_cosine"].items()}
    figures["as_published"] = means["indistill"] > means["pkt"] > means["cross_entropy"]
    figures["seconds"] = {way: [one.seconds for one in ones] for way, ones in found.items()}
    return figures


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def line(trained: Trained) -> str:
    scores = trained.scores
    return (
        f"mAP {scores['map_cosine']:.2f} cosine, {scores['map_l2']:.2f} L2, precision of the first 100 "
        f"{scores['precision_at_100_cosine']:.2f} %, {trained.seconds:.0f} s"
    )


def show(figures: dict[str, Any]) -> None:
    print(f"\n{figures['machine']}, {figures['date']}, {figures['total_seconds'] / 60:.1f} minutes")
    print("  Cnn32_Small by   " + "".join(f"{name.replace('precision_at_', 'p@'):>18}" for name in FIGURES))
    for way in WAYS:
        cells = [figures[name][way] for name in FIGURES]
        print(f"  {way:16} " + "".join(f"{statistics.mean(c):10.2f} ± {spread(c):5.2f}" for c in cells))
    for other in ("pkt", "cross_entropy"):
        gain = figures[f"over_{other}"]
        print(f"InDistill over {other}, map_cosine in points: {gain['mean']:+.2f}, sd {gain['sd']:.2f}")
    print("the published order" if figures["as_published"] else "not the published order")


if __name__ == "__main__":
    main()
