import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optuna
import pytest
from full_files import no_file_larger_than
from hintsearch.models.files import FULL_DISK
from hintsearch.search.events import Event, Finished, Reported, Suggested, event_from_dict, event_to_dict
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.study_types import CONTROL_ARMS
from optuna.trial import TrialState

Suggest = Callable[..., Suggested]
NAME = "digits-20260101-120000"


def take_in(sampler: ArmSampler, events: Sequence[Event]) -> list[Event]:
    for event in events:
        sampler.on_event(event)
    return list(events)


def course(number: int) -> list[Event]:
    """How trial `number` goes on after its suggestion: each outcome, and some still running, come about."""
    accuracies = [0.3 + 0.6 * (number * 37 % 11) / 11, 0.35 + 0.6 * (number * 53 % 13) / 13]
    first, last = (
        Reported(number, epoch, {"val_accuracy": accuracy, "val_loss": 1 - accuracy}, None)
        for epoch, accuracy in zip((8, 24), accuracies, strict=True)
    )
    return [
        [first, Finished(number, "pruned", "")],
        [first, last, Finished(number, "completed", "")],
        [Finished(number, "failed", "it broke")],
        [first],
    ][number % 4]


@pytest.fixture(scope="module")
def quick_tpe(studied: Callable[..., Study]) -> Study:
    """Digits, with Optuna's TPE from the fifth search trial on."""
    return studied("budget.startup_trials=4")


def run(study: Study, suggest: Suggest) -> tuple[ArmSampler, list[Event]]:
    """A sampler after 7 control and 13 search trials, two at a time, and all their events."""
    sampler = ArmSampler(study, NAME, 3)
    events: list[Event] = []
    for number in range(1, 21):
        control = CONTROL_ARMS[number - 1] if number <= 7 else ""
        events += take_in(sampler, [suggest(sampler, number, control)])
        if number > 1:
            events += take_in(sampler, course(number - 1))
    return sampler, events


@pytest.fixture
def undisturbed(quick_tpe: Study, suggest: Suggest) -> tuple[ArmSampler, list[Event]]:
    return run(quick_tpe, suggest)


@pytest.fixture
def replayed(quick_tpe: Study, undisturbed: tuple[ArmSampler, list[Event]]) -> ArmSampler:
    """A new sampler that has heard of the same events, as read from a journal."""
    sampler = ArmSampler(quick_tpe, NAME, 3)
    for event in undisturbed[1]:
        sampler.on_event(event_from_dict(json.loads(json.dumps(event_to_dict(event)))))
    return sampler


def next_three(sampler: ArmSampler, suggest: Suggest, control: str = "") -> list[Suggested]:
    found = []
    for number in (21, 22, 23):
        found.append(suggest(sampler, number, control))
        take_in(sampler, [found[-1], *course(number)])
    return found


def test_replayed_sampler_gives_the_suggestions_of_the_undisturbed_one(
    undisturbed: tuple[ArmSampler, list[Event]], replayed: ArmSampler, suggest: Suggest
) -> None:
    assert next_three(replayed, suggest) == next_three(undisturbed[0], suggest)


def test_replayed_sampler_gives_a_control_s_suggestions_of_the_undisturbed_one(
    undisturbed: tuple[ArmSampler, list[Event]], replayed: ArmSampler, suggest: Suggest
) -> None:
    ours, theirs = (next_three(sampler, suggest, "stage_ends") for sampler in (replayed, undisturbed[0]))
    assert ours == theirs


def test_suggestions_depend_on_the_trials_before(quick_tpe: Study, replayed: ArmSampler, suggest: Suggest) -> None:
    assert next_three(replayed, suggest) != next_three(ArmSampler(quick_tpe, NAME, 3), suggest)


def test_unfinished_trial_is_told_when_it_goes_on(
    replayed: ArmSampler, undisturbed: tuple[ArmSampler, list[Event]], suggest: Suggest
) -> None:
    goes_on = [Reported(20, 8, {"val_accuracy": 0.9}, None), Finished(20, "pruned", "")]
    for sampler in (replayed, undisturbed[0]):
        take_in(sampler, goes_on)
    assert next_three(replayed, suggest) == next_three(undisturbed[0], suggest)


def test_suggestion_depends_on_seed_and_number(studied: Callable[..., Study]) -> None:
    first, again = (ArmSampler(studied("seed=1"), NAME, 3).suggest(8, "") for _ in range(2))
    other_number = ArmSampler(studied("seed=1"), NAME, 3).suggest(9, "")
    other_seed = ArmSampler(studied("seed=2"), NAME, 3).suggest(8, "")
    assert first == again
    assert first != other_number
    assert first != other_seed


@pytest.fixture(scope="module")
def saved(
    quick_tpe: Study, suggest: Suggest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, optuna.Study]]:
    """Optuna's studies by name, as read from the file that the sampler saves."""
    path = tmp_path_factory.mktemp("optuna") / "optuna.db"
    path.write_text("an older file")
    run(quick_tpe, suggest)[0].save(path)
    assert [file.name for file in path.parent.iterdir()] == ["optuna.db"]
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    yield {name: optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)}
    storage.engine.dispose()


def reports(number: int) -> dict[int, float]:
    """The accuracies by epoch that trial `number` has reported."""
    return {event.epoch: event.metrics["val_accuracy"] for event in course(number) if isinstance(event, Reported)}


@pytest.mark.parametrize(
    ("number", "state"),
    [(12, TrialState.PRUNED), (13, TrialState.COMPLETE), (14, TrialState.FAIL), (15, TrialState.RUNNING)],
)
def test_trap_1_trial_is_told_as_what_it_is(saved: dict[str, optuna.Study], number: int, state: TrialState) -> None:
    trial = saved[NAME].trials[number - 8]
    assert (trial.state, trial.intermediate_values) == (state, reports(number))


def test_trap_1_value_of_a_completed_trial_is_its_last_report(saved: dict[str, optuna.Study]) -> None:
    assert saved[NAME].trials[13 - 8].value == reports(13)[24]


def test_trap_7_study_names_are_unique_to_search_and_arm(saved: dict[str, optuna.Study]) -> None:
    assert set(saved) == {NAME, *(f"{NAME}/{control}" for control in CONTROL_ARMS)}


def test_trap_7_all_studies_have_the_objective_s_direction(saved: dict[str, optuna.Study]) -> None:
    assert {study.direction for study in saved.values()} == {optuna.study.StudyDirection.MAXIMIZE}


def test_trap_31_control_trials_are_in_the_studies_of_their_arms_alone(saved: dict[str, optuna.Study]) -> None:
    assert {name: len(study.trials) for name, study in saved.items()} == {
        name: 13 if name == NAME else 1 for name in saved
    }


def test_trap_7_objective_that_is_minimised_is_optuna_s_direction(
    studied: Callable[..., Study], suggest: Suggest, tmp_path: Path
) -> None:
    sampler = ArmSampler(studied("objective={metric: val_loss, direction: minimize}"), NAME, 3)
    take_in(sampler, [suggest(sampler, 5), *course(5)])
    sampler.save(tmp_path / "optuna.db")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    study = optuna.load_study(study_name=NAME, storage=storage)
    reported = [event for event in course(5) if isinstance(event, Reported)]
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert study.best_value == reported[-1].metrics["val_loss"]
    storage.engine.dispose()


def test_studies_that_find_no_room_leave_the_older_file(quick_tpe: Study, suggest: Suggest, tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    path.write_text("an older file")
    sampler, *_ = run(quick_tpe, suggest)
    with no_file_larger_than(1 << 10), pytest.raises(OSError, match="too large") as raised:
        sampler.save(path)
    assert raised.value.errno in FULL_DISK
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def many(studied: Callable[..., Study]) -> list[dict[str, object]]:
    """200 random suggestions of the search."""
    sampler = ArmSampler(studied("budget.startup_trials=1000"), NAME, 3)
    return [sampler.suggest(number, "")[0] for number in range(1, 201)]


def test_trap_31_metric_subset_is_never_empty(many: list[dict[str, object]]) -> None:
    assert all(str(parameters["hints.metrics"]) for parameters in many)


def test_every_metric_is_suggested_alone(many: list[dict[str, object]], digits: Study) -> None:
    alone = {parameters["hints.metrics"] for parameters in many} & set(digits.space.hints.metrics)
    assert alone == set(digits.space.hints.metrics)


def test_trap_31_term_that_is_off_has_weight_0_and_no_temperature(many: list[dict[str, object]]) -> None:
    off = [parameters for parameters in many if parameters["weight.logit"] == 0]
    assert 50 < len(off) < 150
    assert all("temperature" not in parameters for parameters in off)


def test_term_that_is_on_lies_in_its_range(many: list[dict[str, object]]) -> None:
    on = [float(str(parameters["weight.logit"])) for parameters in many if parameters["weight.logit"] != 0]
    assert all(0.1 <= weight <= 10 for weight in on)


def test_weights_are_drawn_evenly_over_their_decades(many: list[dict[str, object]]) -> None:
    below_1 = [parameters for parameters in many if float(str(parameters["weight.hint"])) < 1]
    assert 60 < len(below_1) < 140  # 0.01..100: half of the decades lie below 1


def test_search_reaches_every_choice(many: list[dict[str, object]]) -> None:
    assert {parameters["hints.clusters"] for parameters in many} == {1, 2, 3, 4, 5}
    assert {parameters["hints.selector"] for parameters in many} == {"paper_kmeans", "kmedoids"}
    assert {parameters["loss.hint"] for parameters in many} == {"fitnet", "at", "sp"}


@pytest.mark.parametrize("control", CONTROL_ARMS)
def test_control_s_first_trial_has_the_study_s_defaults(digits: Study, control: str) -> None:
    parameters, _ = ArmSampler(digits, NAME, 3).suggest(1, control)
    hints = {"hints.clusters": 3, "hints.metrics": "", "hints.selector": control, "loss.hint": "fitnet"}
    logit = {"weight.logit": 1.0, "loss.logit": "kd", "temperature": 4.0}
    expected = {"weight.hint": 1.0, **hints, **logit, "weight.classification": 1.0, "lr": digits.recipe.lr}
    if control in ("no_distillation", "kd_only"):
        expected = {key: value for key, value in expected.items() if key not in hints} | {"weight.hint": 0.0}
    if control == "no_distillation":
        expected = {key: value for key, value in expected.items() if key not in logit} | {"weight.logit": 0.0}
    assert parameters == expected


def test_control_s_further_trials_come_from_the_space(digits: Study, suggest: Suggest) -> None:
    sampler = ArmSampler(digits, NAME, 3)
    first, second = (suggest(sampler, number, "random") for number in (1, 8))
    assert second.parameters["weight.hint"] != first.parameters["weight.hint"]
    assert second.parameters["hints.selector"] == "random"


def test_trap_31_kd_only_keeps_its_logit_loss(digits: Study) -> None:
    sampler = ArmSampler(digits, NAME, 3)
    weights = [sampler.suggest(number, "kd_only")[0]["weight.logit"] for number in range(1, 31)]
    assert min(weights) >= 0.1


def test_logit_losses_are_searched_where_there_are_several(studied: Callable[..., Study]) -> None:
    sampler = ArmSampler(studied("space.loss.logit=[dkd, wsl]"), NAME, 3)
    many = [sampler.suggest(number, "")[0] for number in range(1, 41)]
    assert {parameters.get("loss.logit") for parameters in many} == {"dkd", "wsl", None}
    assert all(("loss.logit" in parameters) == (parameters["weight.logit"] > 0) for parameters in many)


def test_a_control_begins_with_the_first_logit_loss(studied: Callable[..., Study]) -> None:
    sampler = ArmSampler(studied("space.loss.logit=[wsl, kd, dkd]"), NAME, 3)
    assert sampler.suggest(1, "kd_only")[0]["loss.logit"] == "wsl"


def test_control_has_as_many_hint_points_as_the_student_has_stages(digits: Study) -> None:
    assert ArmSampler(digits, NAME, 4).suggest(1, "evenly_spaced")[0]["hints.clusters"] == 4


def test_learning_rate_is_the_recipe_s_unless_it_is_searched(studied: Callable[..., Study]) -> None:
    fixed = ArmSampler(studied("recipe.lr=0.07"), NAME, 3).suggest(1, "")[0]["lr"]
    searched = ArmSampler(studied("recipe.lr=0.07", "space.lr={low: 0.1, high: 1}"), NAME, 3).suggest(1, "")[0]["lr"]
    assert fixed == 0.07
    assert 0.1 <= searched <= 1


def test_single_choice_is_no_question_to_optuna(studied: Callable[..., Study]) -> None:
    study = studied("space.loss.hint=[at]", "space.hints.selectors=[kmedoids]", "space.hints.metrics=[r2_cca]")
    parameters, distributions = ArmSampler(study, NAME, 3).suggest(1, "")
    assert (parameters["loss.hint"], parameters["hints.selector"]) == ("at", "kmedoids")
    assert parameters["hints.metrics"] == "r2_cca"
    assert set(distributions) <= {"hints.clusters", "weight.hint", "weight.logit.on", "weight.logit", "temperature"}
