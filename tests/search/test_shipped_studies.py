from pathlib import Path

import hintsearch.studies
import pytest
from hintsearch.search.preflight import check_without_data
from hintsearch.search.study import load_study, validate_study

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
