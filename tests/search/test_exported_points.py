"""Exported configurations as points of a space: they are the very trials that they were exported of, or refused."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.events import Began, Event, Finished, Reported, Suggested
from hintsearch.search.export import HintFile, export_hints, load_hints
from hintsearch.search.journal import SearchLog
from hintsearch.search.points import point_of
from hintsearch.search.preparation import Preparation
from hintsearch.search.runner import resume_search, run_search
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver
from mlflow.tracking import MlflowClient
from recorded_search import recorded_search

NAME = "points-20260101-120000"
CONTROL, SEARCHED = 1, range(2, 8)
RICH = [
    "space.loss.hint=[at+sp, fitnet]",
    "space.weight.by_loss={sp: {low: 1, high: 2}}",
    "space.weight.embedding={low: 0.1, high: 1, optional: true}",
    "space.loss.embedding=[pkt_symmetric, cosine]",
    "space.loss.logit=[kd, wsl]",
    "space.lr={low: 0.01, high: 1}",
    "space.student_width=[0.25, 0.5]",
]


@pytest.fixture(scope="module")
def rich(studied: Callable[..., Study]) -> Study:
    """A space with all that a configuration can have."""
    return studied(*RICH, "budget.startup_trials=1000", "seed=3")


@pytest.fixture(scope="module")
def trials(rich: Study, resolver: HintResolver) -> dict[int, Suggested]:
    """A control, and random suggestions of the search."""
    sampler, found = ArmSampler(rich, NAME, 3), {}
    for number in (CONTROL, *SEARCHED):
        control = "stage_ends" if number == CONTROL else ""
        parameters, distributions = sampler.suggest(number, control)
        hints, selection = resolver.resolve(number, control, parameters)
        assert selection is not None
        arm = "control" if control else "search"
        found[number] = Suggested(number, arm, control, parameters, distributions, hints.to_dict(), asdict(selection))
    return found


@pytest.fixture(scope="module")
def exported(
    client: MlflowClient,
    rich: Study,
    preparation: Preparation,
    trials: dict[int, Suggested],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, HintFile]:
    """All of them as files, read back."""
    events: list[Event] = []
    for number, suggested in trials.items():
        report = Reported(number, 24, {"val_accuracy": 0.5}, None)
        events += [suggested, report, Finished(number, "completed", "")]
    folder = tmp_path_factory.mktemp("points")
    record = recorded_search(client, NAME, rich, preparation, folder, events)
    paths = {number: folder / f"{number}.yaml" for number in trials}
    for number, path in paths.items():
        export_hints(client, record, path, number)
    return {number: load_hints(path) for number, path in paths.items()}


def test_trials_are_of_all_kinds(trials: dict[int, Suggested]) -> None:
    """Else what follows would show less than it says."""
    found = [trials[number].parameters for number in SEARCHED]
    assert {parameters["loss.hint"] for parameters in found} == {"at+sp", "fitnet"}
    assert {parameters["student.width"] for parameters in found} == {0.25, 0.5}
    assert {parameters["weight.logit"] > 0 for parameters in found} == {True, False}
    assert {parameters["weight.embedding"] > 0 for parameters in found} == {True, False}


@pytest.mark.parametrize("number", SEARCHED)
def test_point_has_the_parameters_of_the_exported_trial(
    rich: Study, trials: dict[int, Suggested], exported: dict[int, HintFile], number: int
) -> None:
    # A term that is off need not be there.
    expected = {name: value for name, value in trials[number].parameters.items() if value != 0}
    assert {name: value for name, value in point_of(exported[number], rich).items() if value != 0} == expected


@pytest.mark.parametrize("number", SEARCHED)
def test_trial_of_a_point_is_the_exported_one(
    rich: Study, trials: dict[int, Suggested], exported: dict[int, HintFile], number: int
) -> None:
    parameters, distributions = ArmSampler(rich, "another search", 3).suggest(9, "", point_of(exported[number], rich))
    assert parameters == trials[number].parameters
    assert distributions == trials[number].distributions


def test_trap_31_control_is_no_point(rich: Study, exported: dict[int, HintFile]) -> None:
    assert refusal(exported[CONTROL], rich) == (
        f"--points names trial {CONTROL} of {NAME}, whose hint points no layer metrics chose; leave it out: controls "
        "are run anyway"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["space.loss.hint=[crd]", "space.weight.by_loss={}"], "loss.hint is LOSSES, but the space has crd alone"),
        (["space.lr=null"], "lr is LR, but the space has 0.1 alone"),
        (["space.student_width=[0.125, 1]"], "student.width is WIDTH, but the space has 0.125, 1.0"),
    ],
)
def test_point_outside_of_the_space_is_refused_with_where_it_comes_from(
    studied: Callable[..., Study], exported: dict[int, HintFile], changes: list[str], said: str
) -> None:
    number = SEARCHED[0]
    found = exported[number]
    values: dict[str, Any] = {
        "LOSSES": "+".join(dict.fromkeys(pair.loss for pair in found.hints.pairs)),
        "LR": found.training.recipe["lr"],
        "WIDTH": found.student.width,
    }
    for name, value in values.items():
        said = said.replace(name, str(value))
    study = studied(*RICH, *changes)
    assert refusal(found, study) == (
        f"--points names trial {number} of {NAME}, which is outside of the study's space: {said}; widen it, or leave "
        "the point out"
    )


def test_points_for_a_resume_that_adds_no_trials_are_refused(
    rich: Study, exported: dict[int, HintFile], tmp_path: Path
) -> None:
    (tmp_path / "any").mkdir()
    log = SearchLog(tmp_path / "any" / "journal.jsonl")
    log.record(Began("any", rich.resolved(), "0", "sqlite:///any.db"))
    journal = log.path.read_bytes()
    with pytest.raises(InputError) as caught:
        resume_search("any", tmp_path, points=[exported[SEARCHED[0]]])
    assert str(caught.value) == (
        "--points adds to the trials to come; give it at the launch of a search, or with --extend"
    )
    assert log.path.read_bytes() == journal


def test_search_with_a_point_outside_of_its_space_creates_nothing(
    studied: Callable[..., Study], exported: dict[int, HintFile], tmp_path: Path
) -> None:
    study = studied(f"storage.path={tmp_path / 'results'}")
    with pytest.raises(InputError, match=r"outside of the study's space"):
        run_search(study, tracking=f"sqlite:///{tmp_path / 'mlflow.db'}", points=[exported[SEARCHED[0]]])
    assert list(tmp_path.iterdir()) == []


def refusal(hints: HintFile, study: Study) -> str:
    with pytest.raises(InputError) as caught:
        point_of(hints, study)
    return str(caught.value)
