"""The disk of the results fills up in the middle of a trial, twice; then there is space again."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disturbances import HANGS_S, NUMBERS, Undisturbed
from mlflow.tracking import MlflowClient
from processes import Ended
from search_records import (
    comparable,
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
)

SCRIPT = Path(__file__).parents[1] / "support" / "full_disk.py"
LEGS = ("nothing fits", "lines fit")


@dataclass(frozen=True)
class Full:
    """A search that found its disk full.

    Attributes:
        store: of MLflow, on another disk.
        legs: by how full the disk was; each a `Leg` with the journal's text.
        last: how it came to its end.
        events: its whole journal.
    """

    store: str
    legs: dict[str, dict[str, Any]]
    last: Ended
    events: list[dict]


@pytest.fixture(scope="module")
def full(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Full:
    folder = tmp_path_factory.mktemp("full")
    answer = folder / "answer.json"
    command = ["unshare", "--map-root-user", "--mount", sys.executable, SCRIPT, folder, cache, answer]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3 * HANGS_S)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(answer.read_text())
    last = Ended(**found["last"])
    assert last.code == 0, last.err
    return Full(f"sqlite:///{folder / 'mlflow.db'}", found["legs"], last, found["events"])


@pytest.mark.parametrize("leg", LEGS)
def test_a_full_disk_ends_a_search_with_one_clear_line_and_the_resume_command(full: Full, leg: str) -> None:
    ended = full.legs[leg]["ended"]
    assert ended["code"] in (1, 3)
    assert "Traceback" not in ended["err"]
    assert len([line for line in ended["err"].splitlines() if "No space left on device" in line]) == 1
    assert "search full.yaml --name full --resume" in ended["err"]


@pytest.mark.parametrize("leg", LEGS)
def test_a_full_disk_damages_no_line_of_the_journal(full: Full, leg: str) -> None:
    whole, _, _ = full.legs[leg]["journal"].rpartition("\n")
    written = [json.loads(line) for line in whole.splitlines()]
    assert full.events[: len(written)] == written


@pytest.mark.parametrize("leg", LEGS)
def test_a_full_disk_is_no_trial_s_failure(full: Full, leg: str) -> None:
    assert "failed" not in {e["outcome"] for e in full.legs[leg]["after"] if e["event"] == "outcome"}


def test_no_trial_is_lost_or_run_twice(full: Full) -> None:
    assert [e["number"] for e in full.events if e["event"] == "suggestion"] == NUMBERS
    assert repeated_events(full.events) == []
    assert missing_epochs(full.events) == {}


def test_trap_3_trials_results_and_rungs_are_those_of_an_undisturbed_search(
    full: Full, undisturbed: Undisturbed
) -> None:
    assert journaled_trials(full.events) == journaled_trials(undisturbed.events)
    assert comparable(full.last) == comparable(undisturbed.ended)


def test_trap_14_each_trial_has_its_one_run_and_each_metric_once(full: Full) -> None:
    client = MlflowClient(full.store)
    assert records(client, "tiny", "full") == records_by_journal(full.events)
    assert statuses(client, "tiny") == {"FINISHED": len(NUMBERS) + 1}
