"""Two searches at once, launched in the same second from one folder, on one sqlite store that neither has made yet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from disturbances import HANGS_S, NUMBERS, SMALL_STUDY, DisturbedSearch, Undisturbed
from mlflow.tracking import MlflowClient
from processes import Ended, ended
from search_records import comparable, journaled_trials, records, records_by_journal, statuses

MINIMISED = {**SMALL_STUDY, "objective": {"metric": "val_loss", "direction": "minimize"}}


@dataclass(frozen=True)
class Both:
    """Two searches of one experiment, with opposite directions.

    Attributes:
        searches: where they lie, by name.
        ended: how they ended.
    """

    searches: dict[str, DisturbedSearch]
    ended: dict[str, Ended]

    def client(self) -> MlflowClient:
        """On their common store."""
        return MlflowClient(self.searches["up"].store)


@pytest.fixture(scope="module")
def both(new_search: Callable[..., DisturbedSearch]) -> Both:
    up = new_search("up")
    searches = {"up": up, "down": new_search("down", up.folder, study=MINIMISED)}
    running = {name: search.start() for name, search in searches.items()}
    return Both(searches, {name: ended(process, HANGS_S) for name, process in running.items()})


@pytest.mark.parametrize("name", ["up", "down"])
def test_trap_13_both_searches_finish_on_a_store_that_neither_had_made(both: Both, name: str) -> None:
    assert both.ended[name].code == 0, both.ended[name].err
    assert sorted(journaled_trials(both.searches[name].events())) == NUMBERS


@pytest.mark.parametrize("name", ["up", "down"])
def test_trap_13_each_search_has_its_own_runs_in_the_common_store(both: Both, name: str) -> None:
    assert records(both.client(), "tiny", name) == records_by_journal(both.searches[name].events())


def test_trap_13_no_run_is_left_running_and_none_belongs_to_no_search(both: Both) -> None:
    assert statuses(both.client(), "tiny") == {"FINISHED": 2 * (len(NUMBERS) + 1)}


def test_trap_7_a_search_is_not_moved_by_one_of_the_other_direction(both: Both, undisturbed: Undisturbed) -> None:
    assert journaled_trials(both.searches["up"].events()) == journaled_trials(undisturbed.events)
    assert comparable(both.ended["up"]) == comparable(undisturbed.ended)


def test_trap_7_each_search_has_the_winner_of_its_own_direction(both: Both) -> None:
    for name, metric, best in (("up", "val_accuracy", max), ("down", "val_loss", min)):
        document = both.ended[name].document()
        ours = [trial for trial in document["trials"] if trial["outcome"] == "completed"]
        exported = yaml.safe_load(Path(document["hints"]).read_text())
        assert exported["evidence"]["metric"] == metric
        assert exported["trial"] == best(ours, key=lambda trial, metric=metric: trial["metrics"][metric])["number"]
