"""The live table, and the lines that stand for it where there is no terminal."""

import io
from collections.abc import Callable, Sequence

import pytest
from hintsearch.search.events import Confirming, Event, Finished, Reported, Retried, Suggested
from hintsearch.search.journal import SearchLog
from hintsearch.search.live import LiveTable
from hintsearch.search.plan import confirm_seeds
from hintsearch.search.study import Study
from hintsearch.search.view import View, loss_cell
from rich.console import Console
from rich.text import Text

MEASURED = {"val_accuracy": 0.5, "val_map_cosine": 0.1234}
# As between two rungs, where no rankings are measured.
UNMEASURED = {"val_accuracy": 0.9}


@pytest.fixture
def shown(log: SearchLog, studied: Callable[..., Study], suggested: Callable[..., Suggested]) -> Callable[..., str]:
    """What is shown of search trial 1 and control 2 after some events, with or without a terminal."""

    def show(*events: Event, terminal: bool = False, overrides: Sequence[str] = ()) -> str:
        view, screen = View(), io.StringIO()
        view.console = Console(file=screen, width=200, force_terminal=terminal, color_system=None)
        table = LiveTable(view, log.history, studied("objective.metric=val_map_cosine", *overrides))
        for event in (suggested(1), suggested(2, "kd_only"), *events):
            log.record(event)
            table.on_event(event)
        if terminal:
            view.console.print(table._table())
        return screen.getvalue()

    return show


def row(screen: str, number: int) -> list[str]:
    """The cells of a trial."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.splitlines() if "│" in line]
    (found,) = [cell for cell in cells if cell[0] == str(number)]
    return found


def test_table_shows_the_latest_value_that_is_known(shown: Callable[..., str]) -> None:
    reports = [Reported(1, 8, MEASURED, "continue"), Reported(1, 9, UNMEASURED, None)]
    *_, epoch, value, state = row(shown(*reports, terminal=True), 1)
    assert (epoch, value, state) == ("9/24", "0.1234", "running")


def test_table_shows_no_value_before_the_first_is_known(shown: Callable[..., str]) -> None:
    screen = shown(Reported(1, 7, UNMEASURED, None), terminal=True)
    assert [row(screen, number)[-3:] for number in (1, 2)] == [["7/24", "", "running"], ["0/24", "", "running"]]


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([Reported(1, 8, MEASURED, "stop")], "pruned with val_map_cosine 0.1234 at epoch 8"),
        ([Reported(1, 8, MEASURED, None), Reported(1, 9, UNMEASURED, None)], "with val_map_cosine 0.1234 at epoch 9"),
        ([Reported(1, 7, UNMEASURED, None)], "pruned at epoch 7"),
        ([], "pruned"),
    ],
)
def test_line_of_a_finished_trial_says_the_latest_value_that_is_known(
    shown: Callable[..., str], reports: list[Event], said: str
) -> None:
    (line,) = shown(*reports, Finished(1, "pruned", "")).splitlines()
    assert line.startswith("[1/39] trial 1 (search, ")
    assert line.endswith(said)


def test_line_of_a_failed_trial_says_why(shown: Callable[..., str]) -> None:
    assert shown(Finished(2, "failed", "it broke")) == "[1/39] trial 2 (kd_only) failed: it broke\n"


def test_retry_is_said_with_its_reason_and_how_many_there_may_be(shown: Callable[..., str]) -> None:
    assert shown(Retried(1, 1, "RuntimeError: it broke")) == (
        "Trial 1 failed (RuntimeError: it broke); it goes on from its last checkpoint, retry 1 of 2.\n"
    )


def test_what_is_confirmed_is_said_once(shown: Callable[..., str]) -> None:
    repeats = [{"confirms": number, "data_seed": seed, "init_seed": seed} for seed in (7, 8, 9) for number in (1, 2)]
    said = shown(Confirming(repeats))
    assert said.startswith("Confirming trials 1 (search, ")
    assert said.endswith("), 2 (kd_only): 6 trainings with fresh seeds.\n")


def test_lines_count_what_is_really_confirmed(shown: Callable[..., str], studied: Callable[..., Study]) -> None:
    """Before that, the most that may be: here three repeats of each of the two trials."""
    small = ("budget.trials=1", "controls={arms: [kd_only], trials: 1}")
    seeds = confirm_seeds(studied(*small))
    repeats = [{"confirms": 1, "data_seed": data, "init_seed": init} for data, init in seeds]
    # The control has no value to be confirmed by.
    trials = [Reported(1, 24, MEASURED, None), Finished(1, "completed", ""), Finished(2, "completed", "")]
    said = shown(*trials, Confirming(repeats), Finished(2, "completed", ""), overrides=small).splitlines()
    assert [line[:5] for line in said if line.startswith("[")] == ["[1/8]", "[2/8]", "[2/5]"]


def test_line_of_a_repeat_says_what_it_confirms(shown: Callable[..., str], suggested: Callable[..., Suggested]) -> None:
    repeat = suggested(28, "kd_only", arm="confirm", confirms=2)
    *_, line = shown(repeat, Finished(28, "completed", "")).splitlines()
    assert line == "[1/39] trial 28 (confirms 2, kd_only) completed"


def test_halved_batches_are_said_once_for_a_trial(shown: Callable[..., str]) -> None:
    halved = {"accumulation_steps": 2.0}
    assert shown(Reported(1, 1, halved, None), Reported(1, 2, halved, None), Reported(2, 1, UNMEASURED, None)) == (
        "Trial 1 ran out of device memory in epoch 1: its batches are computed in halves from now on.\n"
    )


def test_weights_of_a_combination_are_all_shown(shown: Callable[..., str], suggested: Callable[..., Suggested]) -> None:
    combined = {**suggested(3).parameters, "loss.hint": "at+crd", "weight.hint": 0.25, "weight.hint.2": 1000.0}
    cells = row(shown(suggested(3, parameters=combined), terminal=True), 3)
    assert "at+crd" in cells
    assert "0.25 1e+03" in cells


def test_losses_of_hints_and_of_penultimate_features_are_shown_by_their_names() -> None:
    parameters = {"loss.hint": "at+/some/folder/mine.py:own", "loss.embedding": "pkt_symmetric"}
    assert loss_cell(parameters) == "at+own (pkt_symmetric)"
    assert loss_cell({"loss.embedding": "pkt_symmetric"}) == "(pkt_symmetric)"
    assert loss_cell({"loss.hint": "fitnet"}) == "fitnet"
    # As a table prints it: brackets would be read as markup.
    assert Text.from_markup(loss_cell(parameters)).plain == "at+own (pkt_symmetric)"
