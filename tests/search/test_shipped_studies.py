from pathlib import Path

import hintsearch.studies
import pytest
from hintsearch.search.preflight import check_without_data
from hintsearch.search.study import load_study, validate_study
from processes import call

NAMES = sorted(path.stem for path in Path(hintsearch.studies.__path__[0]).glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_study_fits_its_networks(name: str) -> None:
    study = load_study(name)
    shapes = check_without_data(study)
    assert shapes.stages <= len(shapes.teacher)
    assert validate_study(study.resolved(), name) == study
    # Also in types: what is cached has the study's text in its key.
    assert str(validate_study(study.resolved(), name).model_dump()) == str(study.model_dump())


def test_published_curriculum_of_indistill_is_the_shipped_one() -> None:
    study = load_study("indistill_cifar10")
    assert study.warmup is not None
    warmup = study.warmup.warmup()
    # 3, 4 and 5 epochs, which with those of the main stage are the published 70; the last 10 at a tenth.
    assert (warmup.total_epochs(3), study.budget.rungs) == (12, (58,))
    recipe = study.recipe.recipe()
    rates = [recipe.learning_rate((58,), epoch) for epoch in (0, 47.99, 48, 57)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


IMAGES = """
import numpy as np


class Drawn:
    labels = np.arange(5 * {classes}) % {classes}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return np.random.default_rng(row).integers(0, 256, {shape}, dtype=np.uint8), int(self.labels[row])


def drawn():
    return Drawn(), None, None
"""


@pytest.mark.parametrize(
    ("name", "size", "classes", "overrides"),
    [
        ("cifar100", 32, 100, ()),
        ("tiny_imagenet", 64, 200, ()),
        # Torchvision's weights cannot be had in a test.
        ("imagenet", 224, 1000, ("teacher.checkpoint=null",)),
    ],
)
def test_study_trains_some_steps_on_images_of_the_true_shape(
    name: str, size: int, classes: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "images.py").write_text(IMAGES.format(classes=classes, shape=(size, size, 3)))
    settings = (
        # Drawn when they are read.
        f"data={{memory_gb: 0, name: images.py:drawn, size: {size}, mean: [0.5, 0.5, 0.5], sd: [0.3, 0.3, 0.3]}}",
        "recipe.batch_size=8",
        "resources={cpus_per_trial: 1}",
        *overrides,
    )
    words = [word for setting in settings for word in ("--set", setting)]
    ended = call(["check", name, *words], tmp_path, tmp_path / "cache")
    assert ended.code == 0, ended.err
    assert "s an epoch)" in ended.out
