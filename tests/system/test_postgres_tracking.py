"""Eight searches at once log to an MLflow server on PostgreSQL, which dies in the middle and comes back."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disturbances import NUMBERS, Event, Undisturbed
from hintsearch.search.events import Tracked, event_from_dict
from hintsearch.search.journal import SearchLog
from hintsearch.search.mlflow_logger import MlflowLogger
from hintsearch.search.tracking import TrackedSearch, connect
from postgres import postgres_database
from processes import journal_events
from search_records import Records, records, records_by_journal, statuses
from tracking_server import TrackingServer

SEARCHES = [f"logged-{number}" for number in range(1, 9)]
LOGGED = ("suggestion", "report", "retry", "outcome")
# Between two events of a search: some twenty reports a second of all of them.
PAUSE_S = 0.2
AWAY_S = 5


@dataclass(frozen=True)
class Logged:
    """What came of it.

    Attributes:
        missing: writes of each search that the server has not taken.
        events: the journal of each search.
        records: what the server has of each search.
        statuses: of all runs.
        sent_before: events that all searches together had recorded when the server died.
        sent_after: when it was back.
    """

    missing: dict[str, int]
    events: dict[str, list[Event]]
    records: dict[str, Records]
    statuses: dict[str, int]
    sent_before: int
    sent_after: int


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with postgres_database() as store:
        server = TrackingServer(tmp_path_factory.mktemp("server"), store=store)
        server.start()
        yield server
        server.kill()


class LoggedSearch(threading.Thread):
    """A search without trials: the course of another one is recorded again, event by event, and logged.

    Args:
        uri: of the server.
        folder: of the journal.
        name: of the search.
        course: what is recorded.
    """

    def __init__(self, uri: str, folder: Path, name: str, course: list[Event]) -> None:
        super().__init__(name=name)
        self._course, self.recorded, self.missing = course, 0, -1
        self._log = SearchLog(folder / "journal.jsonl")
        self._tracked = TrackedSearch(connect(uri, create=True), "tiny", name, None)
        self._log.record(Tracked(0, self._tracked.parent_run_id))
        self._logger = MlflowLogger(self._tracked, self._log)
        self._log.listen(self._logger)

    def run(self) -> None:
        for event in self._course:
            self._log.record(event_from_dict(event))
            self.recorded += 1
            time.sleep(PAUSE_S)
        self.missing = self._logger.close(interrupted=False)
        self._tracked.close(self._tracked.parent_run_id, "FINISHED", {})


@pytest.fixture(scope="module")
def logged(server: TrackingServer, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folders = {name: tmp_path_factory.mktemp(name) for name in SEARCHES}
    course = [event for event in undisturbed.events if event["event"] in LOGGED]
    searches = [LoggedSearch(server.uri, folder, name, course) for name, folder in folders.items()]
    for search in searches:
        search.start()
    while min(search.recorded for search in searches) < len(course) // 3:
        time.sleep(0.01)
    server.kill()
    before = sum(search.recorded for search in searches)
    time.sleep(AWAY_S)
    after = sum(search.recorded for search in searches)
    server.start()
    for search in searches:
        search.join()
    client = connect(server.uri, create=False)
    return Logged(
        {search.name: search.missing for search in searches},
        {name: journal_events(folder) for name, folder in folders.items()},
        {name: records(client, "tiny", name) for name in SEARCHES},
        statuses(client, "tiny"),
        before,
        after,
    )


def test_trap_14_searches_go_on_while_the_server_is_away(logged: Logged) -> None:
    assert logged.sent_after > logged.sent_before


def test_trap_14_the_server_has_taken_every_write_of_every_search(logged: Logged) -> None:
    assert logged.missing == dict.fromkeys(SEARCHES, 0)


@pytest.mark.parametrize("name", SEARCHES)
def test_trap_14_every_metric_of_every_search_arrives_once(logged: Logged, name: str) -> None:
    assert sorted(logged.records[name].runs) == [0, *NUMBERS]
    assert logged.records[name] == records_by_journal(logged.events[name])


def test_trap_14_no_run_is_left_running(logged: Logged) -> None:
    assert logged.statuses == {"FINISHED": len(SEARCHES) * (1 + len(NUMBERS))}
