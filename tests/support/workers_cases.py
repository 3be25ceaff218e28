"""Trainings that are the same whether one process has the whole of each batch, or several have a share of it.

As a program, `workers_cases.py RANK SIZE FOLDER`: one of several processes; writes what comes of each case to RANK.pt.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.distill.lazy_images import Decoding, LazyImages
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.distill.warmup import Warmup
from hintsearch.distill.workers import ALONE, Workers
from hintsearch.models.zoo import ModelSpec, build_model
from PIL import Image

STUDENT = ModelSpec("resnet8", 3, 3, width=0.25)
# Of batches of 18 each of two workers has 9, of the last, of 11, five and six; of three: six, and 3, 4 and 4.
RECIPE: dict[str, Any] = {"lr": 0.01, "batch_size": 18, "crop_padding": 1, "batch_norm": "frozen"}
OWN_LOSSES = """
import torch


def coupled(student, teacher):
    ours, theirs = (feature.mean(dim=(1, 2, 3)) for feature in (student, teacher))
    return (ours - ours.mean() - theirs + theirs.mean()).square().mean()


def correlated(student, teacher, labels, temperature):
    ours, theirs = ((logits - logits.mean(dim=0)) / temperature for logits in (student, teacher))
    return (ours - theirs).square().mean(dim=1)
"""


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        hints: what is learned from the teacher.
        recipe: beside `RECIPE`.
        pictures: folder from which images are decoded while they are read; None: they are in memory.
        rungs: epochs.
    """

    hints: HintConfiguration
    recipe: Mapping[str, Any] = field(default_factory=dict)
    pictures: Path | None = None
    rungs: tuple[int, ...] = (2,)


def hinted(
    *losses: str, layers: tuple[str, ...] = ("layer1.0", "layer3.0"), logit: str = "", **more: Any
) -> HintConfiguration:
    """Each hint point with each of these losses."""
    pairs = tuple(HintPair(layer, layer, loss, 0.3) for loss in losses for layer in layers)
    return HintConfiguration(pairs, logit_weight=0.5 if logit else 0.0, logit_loss=logit or "kd", **more)


def cases(folder: Path) -> dict[str, Case]:
    """By name; own losses are written to the folder."""
    own = folder / "own_losses.py"
    own.write_text(OWN_LOSSES)
    losses = ("fitnet", "at", "vid", "fsp", "sp", "cc", "rkd", "pkt_symmetric", "crd", f"{own}:coupled")
    logits = ("kd", "dkd", "dist", f"{own}:correlated")
    weighed = DynamicWeights(hidden=8, meta_batch_size=9, warmup_fraction=0.0)
    return {
        "labels": Case(HintConfiguration()),
        **{f"hint {loss.rpartition('/')[2]}": Case(hinted(loss)) for loss in losses},
        # In shallow layers it is a millionth, a sum of terms that all but cancel: mostly rounding.
        "hint pkt": Case(hinted("pkt", layers=("layer3.0",))),
        **{f"logit {loss.rpartition('/')[2]}": Case(hinted(logit=loss)) for loss in logits},
        "embedding": Case(HintConfiguration(embedding_weight=0.4, embedding_loss="pkt_symmetric")),
        "class weights, smoothing, clipping, average": Case(
            hinted("fitnet"),
            {"class_weights": "balanced", "label_smoothing": 0.1, "clip_norm": 0.5, "ema_decay": 0.9},
        ),
        "adam": Case(hinted("sp"), {"optimizer": "adam", "lr": 1e-3}),
        "warm-up": Case(hinted("fitnet", warmup=Warmup(base_epochs=0))),
        "hkd of logits, features and relations": Case(hinted("fitnet", "sp", logit="kd", dynamic_weights=weighed)),
        "streamed": Case(hinted("fitnet"), pictures=folder / "pictures"),
        "streamed crops": Case(hinted("fitnet"), {"min_crop_area": 0.5}, pictures=folder / "pictures"),
    }


def run(case: Case, workers: Workers = ALONE) -> dict[str, Any]:
    """Metrics of each epoch but clocks, the student's weights, normalisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        teacher = build_model(ModelSpec("resnet8", 3, 3, width=0.5)).train()
        with torch.no_grad():
            teacher(torch.randn(64, 3, 8, 8))
    trainer = Trainer(
        STUDENT,
        _splits(case.pictures),
        Recipe(**{**RECIPE, **case.recipe}),
        case.rungs,
        Seeds(1, 2),
        hints=case.hints,
        teacher=TeacherNetwork(teacher),
        execution=Execution(workers=workers),
    )
    metrics = [result.metrics for result in trainer.epochs()]
    for figures in metrics:
        for clock in ("images_per_second", "warmup_seconds"):
            figures.pop(clock, None)
    state = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    return {"metrics": metrics, "student": state, "normalisers": trainer.normalisers}


def _splits(pictures: Path | None) -> DataSplits:
    """Training images out of PNG files in a folder, or in memory."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (3, 3, 8, 8))

    def draw(count: int) -> ImageSet:
        # One class has twice as many images as each other.
        labels = np.array([0, 1, 2, 0], dtype=np.int64)[np.arange(count) % 4]
        return ImageSet((patterns[labels] + rng.integers(0, 56, (count, 3, 8, 8))).astype(np.uint8), labels)

    train, validation, meta = draw(65), draw(31), draw(20)
    splits = DataSplits(train, validation, None, classes=3, mean=(0.5,) * 3, sd=(0.25,) * 3, meta=meta)
    if pictures is None:
        return splits
    files = [f"{number:03}.png" for number in range(len(train))]
    if not pictures.exists():
        pictures.mkdir()
        for file, image in zip(files, train.images, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(pictures / file)
    return replace(splits, train=LazyImages(ImageFiles(pictures, files, train.labels), Decoding((8, 8))))


def main(rank: int, size: int, folder: Path) -> None:
    """Runs all cases as one of several workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    found = {name: run(case, Workers.of_this_process()) for name, case in cases(folder).items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
