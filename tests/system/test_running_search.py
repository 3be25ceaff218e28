"""A search that is running is resumed by mistake, from another terminal."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from disturbances import HANGS_S, SMALL_STUDY, DisturbedSearch, Event, reported
from processes import Ended, ended
from search_records import journaled_trials, missing_epochs, repeated_events

STUDY = {**SMALL_STUDY, "controls": {"arms": []}, "budget": {**SMALL_STUDY["budget"], "trials": 1, "rungs": [9]}}


@dataclass(frozen=True)
class Twice:
    """A search that was started twice.

    Attributes:
        first: how the first driver ended.
        second: how the second one ended.
        meanwhile: the journal when the second one had ended.
        events: the journal at the end.
    """

    first: Ended
    second: Ended
    meanwhile: list[Event]
    events: list[Event]


@pytest.fixture(scope="module")
def twice(new_search: Callable[..., DisturbedSearch]) -> Twice:
    search = new_search("twice", study=STUDY)
    process = search.start()
    search.wait(process, reported(1, 1))
    # It holds its place while it stands still, so that it cannot be over before the second one has looked.
    process.send_signal(signal.SIGSTOP)
    second = search.finish("--resume")
    meanwhile = search.events()
    process.send_signal(signal.SIGCONT)
    return Twice(ended(process, HANGS_S), second, meanwhile, search.events())


def test_a_running_search_is_not_resumed_beside_itself(twice: Twice) -> None:
    assert twice.second.code == 2
    (line,) = twice.second.err.strip().splitlines()
    assert "twice is running" in line


def test_the_running_search_is_not_disturbed(twice: Twice) -> None:
    assert twice.first.code == 0, twice.first.err
    assert journaled_trials(twice.meanwhile)[1].outcome is None, "the resume came too late"
    assert journaled_trials(twice.events)[1].outcome == "completed"
    assert repeated_events(twice.events) == []
    assert missing_epochs(twice.events) == {}
