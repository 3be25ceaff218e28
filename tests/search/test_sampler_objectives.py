"""What Optuna hears of a search that weighs a cost, and what it suggests where the student's width is searched."""

from collections.abc import Callable, Iterator

import optuna
import pytest
from hintsearch.search.events import Finished, Reported, Suggested
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from optuna.study import StudyDirection
from optuna.trial import TrialState

NAME = "costs-20260101-120000"
# As it is reported in the first epoch only.
PARAMETERS = 5000.0


@pytest.fixture(scope="module")
def costly(studied: Callable[..., Study]) -> Study:
    return studied("objective.against=student_parameters", "space.student_width=[0.25, 0.5]", "budget.startup_trials=2")


def run(study: Study, suggest: Callable[..., Suggested], trials: int) -> ArmSampler:
    """A sampler after a control and some search trials, of which the third one failed."""
    sampler = ArmSampler(study, NAME, 3)
    for number in range(1, trials + 1):
        sampler.on_event(suggest(sampler, number, "kd_only" if number == 1 else ""))
        sampler.on_event(Reported(number, 1, {"val_accuracy": 0.1, "student_parameters": PARAMETERS + number}, None))
        sampler.on_event(Reported(number, 24, {"val_accuracy": 0.5 + number / 100}, None))
        sampler.on_event(Finished(number, "failed" if number == 3 else "completed", ""))
    return sampler


@pytest.fixture(scope="module")
def saved(
    costly: Study, suggest: Callable[..., Suggested], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, optuna.Study]]:
    """Optuna's studies by name, as read from the file that the sampler saves."""
    path = tmp_path_factory.mktemp("optuna") / "optuna.db"
    run(costly, suggest, 6).save(path)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    yield {name: optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)}
    storage.engine.dispose()


def test_cost_is_a_second_direction_of_every_study(saved: dict[str, optuna.Study]) -> None:
    assert set(saved) == {NAME, f"{NAME}/kd_only"}
    for study in saved.values():
        assert study.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]


def test_completed_trial_is_told_with_the_last_value_and_its_cost(saved: dict[str, optuna.Study]) -> None:
    completed = [trial for trial in saved[NAME].trials if trial.state == TrialState.COMPLETE]
    assert [trial.values for trial in completed] == [
        [0.5 + number / 100, PARAMETERS + number] for number in (2, 4, 5, 6)
    ]


def test_no_value_on_the_way_is_reported_where_a_cost_is_weighed(saved: dict[str, optuna.Study]) -> None:
    """Optuna raises at it."""
    assert {len(trial.intermediate_values) for trial in saved[NAME].trials} == {0}


def test_trap_1_failed_trial_is_told_as_failed_where_a_cost_is_weighed(saved: dict[str, optuna.Study]) -> None:
    assert saved[NAME].trials[1].state == TrialState.FAIL


def test_suggestions_go_on_after_two_objectives_were_told(costly: Study, suggest: Callable[..., Suggested]) -> None:
    after = [run(costly, suggest, 6).suggest(7, "") for _ in range(2)]
    assert after[0] == after[1]
    assert after[0] != ArmSampler(costly, NAME, 3).suggest(7, "")


def test_every_width_is_suggested(costly: Study) -> None:
    sampler = ArmSampler(costly.model_copy(update={"seed": 1}), NAME, 3)
    assert {sampler.suggest(number, "")[0]["student.width"] for number in range(1, 21)} == {0.25, 0.5}


@pytest.mark.parametrize("control", ["no_distillation", "kd_only", "random"])
def test_first_trial_of_a_control_has_the_first_width(costly: Study, control: str) -> None:
    assert ArmSampler(costly, NAME, 3).suggest(1, control)[0]["student.width"] == 0.25


def test_study_of_one_width_suggests_none(digits: Study) -> None:
    assert "student.width" not in ArmSampler(digits, NAME, 3).suggest(1, "")[0]
