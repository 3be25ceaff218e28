"""Trial after trial raises; then what makes them raise is mended."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from disturbances import SMALL_STUDY, DisturbedSearch, Leg, reported
from mlflow.tracking import MlflowClient
from processes import Ended
from search_records import missing_epochs, records, records_by_journal, repeated_events, statuses

LOSS = """
from pathlib import Path

BROKEN = Path(__file__).with_name("broken")


def my_loss(student, teacher):
    if BROKEN.exists():
        raise RuntimeError("the loss is broken")
    sizes = [feature.square().mean(dim=(1, 2, 3)) for feature in (student, teacher)]
    return (sizes[0] - sizes[1]).square()
"""
CONTROL, SEARCHED = [1], [2, 3, 4, 5]
FAILURES = 2
STUDY = {
    **SMALL_STUDY,
    "space": {**SMALL_STUDY["space"], "loss": {"hint": ["my_losses.py:my_loss"]}},
    "controls": {"arms": ["no_distillation"], "trials": len(CONTROL)},
    "budget": {
        **SMALL_STUDY["budget"],
        "trials": len(SEARCHED),
        # Nearly all go on.
        "reduction": 1.01,
        "retries": 0,
        "failures": FAILURES,
    },
}


@dataclass(frozen=True)
class Hopeless:
    """A search that was given up, and went on.

    Attributes:
        search: where it lies.
        leg: until it was given up.
        runs: statuses of the runs then.
        last: how it came to its end.
        events: its whole journal.
    """

    search: DisturbedSearch
    leg: Leg
    runs: dict[str, int]
    last: Ended
    events: list[dict]


@pytest.fixture(scope="module")
def hopeless(new_search: Callable[..., DisturbedSearch]) -> Hopeless:
    search = new_search("hopeless", study=STUDY)
    (search.folder / "my_losses.py").write_text(LOSS)
    leg = search.disturb(reported(1, 1), lambda _: (search.folder / "broken").touch())
    runs = statuses(MlflowClient(search.store), "tiny")
    (search.folder / "broken").unlink()
    return Hopeless(search, leg, runs, search.finish("--resume"), search.events())


def test_a_failure_budget_ends_a_hopeless_search_early_with_exit_1(hopeless: Hopeless) -> None:
    assert hopeless.leg.ended.code == 1, hopeless.leg.ended.err
    outcomes = {e["number"]: e["outcome"] for e in hopeless.leg.after if e["event"] == "outcome"}
    assert outcomes == {1: "completed", 2: "failed", 3: "failed"}


def test_a_search_that_is_given_up_says_why_and_how_to_go_on(hopeless: Hopeless) -> None:
    err = hopeless.leg.ended.err
    assert "Traceback" not in err
    (said,) = [line for line in err.splitlines() if "iven up" in line]
    assert "the loss is broken" in said
    assert "search hopeless.yaml --name hopeless --resume" in err


def test_trap_14_a_search_that_is_given_up_leaves_no_run_running(hopeless: Hopeless) -> None:
    assert "RUNNING" not in hopeless.runs
    assert hopeless.runs["FAILED"] >= FAILURES


def test_a_search_that_was_given_up_goes_on_when_the_cause_is_mended(hopeless: Hopeless) -> None:
    assert hopeless.last.code == 0, hopeless.last.err
    outcomes = {e["number"]: e["outcome"] for e in hopeless.events if e["event"] == "outcome"}
    assert sorted(outcomes) == CONTROL + SEARCHED
    assert [n for n, outcome in outcomes.items() if outcome == "failed"] == [2, 3]
    assert repeated_events(hopeless.events) == []
    assert missing_epochs(hopeless.events) == {}


def test_trap_14_each_trial_has_one_run_and_each_metric_once(hopeless: Hopeless) -> None:
    client = MlflowClient(hopeless.search.store)
    assert records(client, "tiny", "hopeless") == records_by_journal(hopeless.events)
    assert statuses(client, "tiny") == {"FINISHED": len(CONTROL + SEARCHED) + 1 - FAILURES, "FAILED": FAILURES}
