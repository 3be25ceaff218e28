"""The setting of `hint_points.py`: which images, which study, which arms."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hintsearch.analysis.hint_selection import CONTROL_SELECTORS
from hintsearch.distill.data import DataSpec, DataSplits, ImageSet, Split, load_data
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.warmup import Warmup
from hintsearch.models.files import replacing
from hintsearch.search.study import Study, validate_study

TRAINED_ON, VALIDATED_ON, META = 10_000, 5_000, 1_000
CIFAR_TRAINING_IMAGES = 50_000
MEAN, SD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
NO_DISTILLATION, KD_ONLY, SEARCHED = "no_distillation", "kd_only", "searched"
RUNGS = (4, 10)
TEACHER_FILE = "teacher.safetensors"
# InDistill's curriculum of three hint points takes the place of the first rung: the last one is the same for all arms.
CURRICULUM = Warmup(epochs=(1, 1, 2))


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        name: of the row.
        title: what it is.
        selector: of the hint points; empty: no hint points, or the search's.
        metrics: layer metrics that the selector clusters by.
        weights: how the weights of the terms follow each image; None: they are fixed.
        warmup: what is learned before the main stage, in the place of the first rung.
    """

    name: str
    title: str
    selector: str = ""
    metrics: tuple[str, ...] = ()
    weights: DynamicWeights | None = None
    warmup: Warmup | None = None

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs of the main stage at which an annealed schedule ends."""
        return tuple(rung - RUNGS[0] for rung in RUNGS[1:]) if self.warmup else RUNGS

    @property
    def is_control(self) -> bool:
        """Whether no layer metric, search or later method has a part in it."""
        return self.name in (NO_DISTILLATION, KD_ONLY) or self.selector in CONTROL_SELECTORS


ARMS = (
    Arm(NO_DISTILLATION, "labels alone"),
    Arm(KD_ONLY, "KD alone"),
    Arm("stage_ends", "KD + FitNet, stage ends", "stage_ends"),
    Arm("evenly_spaced", "KD + FitNet, evenly spaced", "evenly_spaced"),
    Arm("random", "KD + FitNet, random layers", "random"),
    Arm("reversed", "KD + FitNet, reversed", "reversed"),
    Arm("last", "KD + FitNet, last layer", "last"),
    Arm("kmeans_r2_cca", "KD + FitNet, paper k-means (r2_cca)", "paper_kmeans", ("r2_cca",)),
    Arm("kmeans_cka", "KD + FitNet, paper k-means (cka_linear)", "paper_kmeans", ("cka_linear",)),
    Arm("kmedoids", "KD + FitNet, k-medoids (r2_cca)", "kmedoids", ("r2_cca",)),
    Arm(SEARCHED, "searched: winner of a search with ASHA"),
    Arm("hkd", "HKD weights, points of kmeans_r2_cca", "paper_kmeans", ("r2_cca",), weights=DynamicWeights()),
    Arm("indistill", "InDistill warm-up, points of kmeans_r2_cca", "paper_kmeans", ("r2_cca",), warmup=CURRICULUM),
)


@dataclass(frozen=True)
class Amount:
    """How much is trained; what is smaller than the default tries the benchmark out.

    Attributes:
        images: training images.
        teacher_epochs: of the teacher.
        trials: of the search.
    """

    images: int = TRAINED_ON
    teacher_epochs: int = 20
    trials: int = 16


def lay_out(root: Path, folder: Path) -> None:
    """Writes the study's images as archives: 15,000 of the training images, 1,000 others for HKD, and the test images.

    Every class has as many of each. HKD's images are none of the study's, so that all arms train on the same ones.
    """
    if (folder / "meta.npz").is_file():
        return
    place = next((path for path in (root, root / "cifar100") if (path / "train.npz").is_file()), None)
    splits = load_data(
        DataSpec(
            str(place) if place else "cifar100",
            root=str(root),
            validation_fraction=(TRAINED_ON + VALIDATED_ON) / CIFAR_TRAINING_IMAGES,
            train_fraction=META / (CIFAR_TRAINING_IMAGES - TRAINED_ON - VALIDATED_ON),
        ),
        root,
    )
    assert splits.test is not None
    # The last one tells that all are there.
    for name, split in (("train", splits.validation), ("test", splits.test), ("meta", splits.train)):
        images = np.ascontiguousarray(split.read(np.arange(len(split))).transpose(0, 2, 3, 1))
        with replacing(folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, labels=split.labels)


def meta_images(folder: Path) -> Split:
    """The images that HKD's weight network learns on."""
    with np.load(folder / "meta.npz") as archive:
        return ImageSet(np.ascontiguousarray(archive["images"].transpose(0, 3, 1, 2)), archive["labels"])


def splits_of(study: Study, folder: Path) -> DataSplits:
    """The study's training, validation and test images, and those for HKD."""
    splits = load_data(study.data_spec(), folder)
    return DataSplits(
        splits.train,
        splits.validation,
        splits.test,
        splits.classes,
        splits.mean,
        splits.sd,
        meta_images(folder),
    )


def study_of(folder: Path, work: Path, amount: Amount) -> Study:
    """The study whose search is one of the arms; the others share its data, teacher, recipe, rungs and defaults."""
    content: Mapping[str, Any] = {
        "name": "hint-points",
        "seed": 0,
        "data": {
            "name": str(folder),
            "validation_fraction": VALIDATED_ON / (TRAINED_ON + VALIDATED_ON),
            "train_fraction": amount.images / TRAINED_ON,
            "mean": MEAN,
            "sd": SD,
        },
        "teacher": {
            "model": "resnet32",
            "recipe": {"epochs": amount.teacher_epochs},
            "checkpoint": str(work / TEACHER_FILE),
        },
        "student": {"model": "resnet8"},
        "layers": {"metrics": ["r2_cca", "cka_linear"]},
        # Controls are arms of the comparison itself.
        "controls": {"arms": []},
        # And all arms are trained with seeds that the search has not seen.
        "confirm": {"seeds": 0},
        "budget": {"trials": amount.trials, "rungs": list(RUNGS), "startup_trials": 6},
        "resources": {"cpus_per_trial": 1},
        "storage": {"path": str(work)},
        "tracking": {"uri": f"sqlite:///{work / 'mlflow.db'}"},
    }
    return validate_study(dict(content), "the study of hint_points.py")
