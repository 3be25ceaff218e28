"""The tables of what a search found, and the sentences below them."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from hintsearch.analysis.importance import Importances, MetricImportance, ParameterImportance
from hintsearch.analysis.trials import SearchRecord, TrialRow
from hintsearch.search.findings_view import show_arms, show_confirmation, show_importances, show_pareto
from hintsearch.search.view import View
from rich.console import Console


def row(number: int, value: float, control: str = "", confirms: int = 0, **changes: object) -> TrialRow:
    """A completed trial; the seeds of a repeat are its number in its configuration."""
    arm = "confirm" if confirms else "control" if control else "search"
    seed = str(number % 3)
    metrics = {"val_accuracy": value, "training_seconds": 100 * value}
    made = TrialRow(
        number=number,
        arm=arm,
        control=control,
        outcome="completed",
        epochs=24,
        metrics=metrics,
        parameters={"data_seed": seed, "init_seed": seed},
        run_id="",
        error="",
        confirms=confirms,
    )
    return replace(made, **changes)


# Best first, as they are read. Of three trials of the search one was pruned.
PRUNED = row(5, 0.4, outcome="pruned", epochs=8)
SEARCHED = (row(3, 0.9), row(4, 0.8), row(1, 0.7, "kd_only"), row(2, 0.6, "last"), PRUNED)


def record(*repeats: TrialRow, against: str = "") -> SearchRecord:
    return SearchRecord("any", "", "val_accuracy", "maximize", (*SEARCHED, *repeats), {}, against)


def repeated(values: dict[int, tuple[float, float, float]]) -> SearchRecord:
    """With three repeats of each of these configurations."""
    controls = {1: "kd_only", 2: "last"}
    rows = [
        row(6 + 3 * place + seed, value, controls.get(confirms, ""), confirms)
        for place, (confirms, found) in enumerate(values.items())
        for seed, value in enumerate(found)
    ]
    return record(*rows)


@pytest.fixture
def shown() -> Callable[..., str]:
    """What a function shows."""

    def show(function: Callable[..., None], *arguments: object) -> str:
        view, screen = View(), io.StringIO()
        view.console = Console(file=screen, width=200, color_system=None)
        function(view, *arguments)
        return screen.getvalue()

    return show


def cells(screen: str) -> list[list[str]]:
    """Of the rows of all tables."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.splitlines() if line.startswith("│")]


def test_arms_are_shown_with_what_they_were_given(shown: Callable[..., str]) -> None:
    assert cells(shown(show_arms, record())) == [
        ["control kd_only", "1", "24", "0.7000"],
        ["control last", "1", "24", "0.6000"],
        ["search", "3", "56", "0.9000"],
    ]


def test_arm_without_a_completed_trial_shows_no_best(shown: Callable[..., str]) -> None:
    pruned = replace(record(), trials=(PRUNED,))
    assert cells(shown(show_arms, pruned)) == [["search", "1", "8", ""]]


def test_leaderboard_leaves_repeats_to_a_table_of_their_own(shown: Callable[..., str]) -> None:
    screen = shown(View.leaderboard, repeated(HOLDS))
    assert [row[0] for row in cells(screen)] == ["3", "4", "1", "2"]


def confirmation_shown(shown: Callable[..., str], found: SearchRecord) -> str:
    return shown(show_confirmation, found, found.confirmation())


HOLDS = {3: (0.90, 0.88, 0.86), 4: (0.80, 0.80, 0.80), 1: (0.70, 0.69, 0.68)}


def test_confirmation_shows_mean_and_spread_beside_the_searched_value(shown: Callable[..., str]) -> None:
    assert cells(confirmation_shown(shown, repeated(HOLDS))) == [
        ["search", "3", "3", "0.8800 ± 0.0200", "0.9000"],
        ["search", "4", "3", "0.8000 ± 0.0000", "0.8000"],
        ["kd_only", "1", "3", "0.6900 ± 0.0100", "0.7000"],
    ]


def of_size(found: SearchRecord, sizes: dict[int, float]) -> SearchRecord:
    """The same trials with students of so many parameters."""
    trials = [
        replace(trial, metrics={**trial.metrics, "student_parameters": sizes.get(trial.number, 5_000.0)})
        for trial in found.trials
    ]
    return replace(found, trials=tuple(trials))


def test_students_of_another_size_are_told_beside_a_lead(shown: Callable[..., str]) -> None:
    wanted = "Their students differ in size (20,000 and 5,000 parameters)"
    larger = of_size(repeated(HOLDS), {3: 20_000.0})
    assert wanted in confirmation_shown(shown, larger)
    assert wanted in shown(View.verdict, larger, 300)
    same = of_size(repeated(HOLDS), {})
    assert "differ in size" not in confirmation_shown(shown, same) + shown(View.verdict, same, 300)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (("pruned", "pruned"), "Every search trial was behind the controls and stopped at a rung: a null result."),
        (("pruned", "failed"), "No search trial came to its end (1 failed): nothing is known of them."),
        (("failed", "failed"), "No search trial came to its end (2 failed): nothing is known of them."),
    ],
)
def test_search_without_a_completed_trial_is_a_null_only_if_none_failed(
    shown: Callable[..., str], outcomes: tuple[str, str], said: str
) -> None:
    trials = [row(number, 0.4, outcome=outcome) for number, outcome in zip((3, 4), outcomes, strict=True)]
    found = replace(record(), trials=(*trials, row(1, 0.7, "kd_only")))
    assert f"{said} Best control: kd_only (trial 1), val_accuracy 0.7000." in shown(View.verdict, found, 300)


def test_the_one_test_is_told_in_words(shown: Callable[..., str]) -> None:
    screen = confirmation_shown(shown, repeated(HOLDS))
    assert "Trial 3 is better than the control kd_only (trial 1) by 19.0 points (95 % interval " in screen
    assert "what is exported" not in screen


def test_control_that_is_better_is_said_to_be_exported(shown: Callable[..., str]) -> None:
    screen = confirmation_shown(shown, repeated({3: (0.6, 0.61, 0.62), 1: (0.7, 0.72, 0.71)}))
    assert "The control kd_only (trial 1) has the best mean: it is what is exported." in screen
    assert "the search's best lost to what needs no search" in screen


def test_other_trial_of_the_search_that_holds_better_is_said_to_be_exported(shown: Callable[..., str]) -> None:
    screen = confirmation_shown(shown, repeated({3: (0.80, 0.81, 0.82), 4: (0.9, 0.9, 0.9), 1: (0.7, 0.7, 0.7)}))
    assert "Trial 4 has the best mean: it is what is exported. The search ranked trial 3 first, and the test" in screen


def test_nothing_is_claimed_where_no_control_was_confirmed(shown: Callable[..., str]) -> None:
    screen = confirmation_shown(shown, repeated({3: (0.9, 0.9, 0.9)}))
    assert "No control was confirmed, so that nothing is said of whether the search was worth it." in screen


def test_configuration_of_which_every_repeat_failed_has_no_mean(shown: Callable[..., str]) -> None:
    found = repeated({3: (0.9, 0.8, 0.7), 1: (0.7, 0.7, 0.7)})
    trials = tuple(replace(t, outcome="failed") if t.confirms == 1 else t for t in found.trials)
    screen = confirmation_shown(shown, replace(found, trials=trials))
    assert ["kd_only", "1", "0", "", "0.7000"] in cells(screen)
    assert "have no seeds in common" in screen


def test_pareto_set_is_shown_with_its_knee(shown: Callable[..., str]) -> None:
    weighed = record(row(6, 0.85, metrics={"val_accuracy": 0.85, "training_seconds": 45.0}), against="training_seconds")
    slow = replace(weighed.trials[1], metrics={"val_accuracy": 0.8, "training_seconds": 40.0})
    weighed = replace(weighed, trials=(weighed.trials[0], slow, *weighed.trials[2:]))
    assert cells(shown(show_pareto, weighed)) == [
        ["3", "0.9000", "90", ""],
        ["6", "0.8500", "45", "knee"],
        ["4", "0.8000", "40", ""],
    ]


def test_search_without_a_second_objective_shows_no_pareto_set(shown: Callable[..., str]) -> None:
    assert shown(show_pareto, record()) == ""


def test_too_few_trials_are_said_in_the_place_of_importances(shown: Callable[..., str]) -> None:
    screen = shown(show_importances, Importances(12, 50, (), ()))
    assert screen == "Importances: 12 search trials reached the first rung, too few; it takes 50.\n"


def test_importances_are_shown_with_what_chance_alone_would_make(shown: Callable[..., str]) -> None:
    found = Importances(
        60,
        50,
        (ParameterImportance("lr", 0.6, 0.005, 60), ParameterImportance("temperature", 0.3, 0.4, 31)),
        (
            MetricImportance("r2_cca", 0.1, 0.2, 0.0123, (-0.001, 0.0256), 40, 20),
            MetricImportance("cka_linear", 0.0, 1.0, None, None, 60, 0),
        ),
    )
    assert cells(shown(show_importances, found)) == [
        ["lr", "0.600", "0.01", "60"],
        ["temperature", "0.300", "0.40", "31"],
        ["r2_cca", "0.100", "0.20", "+0.0123 (-0.0010 .. +0.0256)", "40 of 60"],
        ["cka_linear", "0.000", "1.00", "", "60 of 60"],
    ]
