import json
from collections.abc import Callable
from typing import get_args

import pytest
from hintsearch.search.events import (
    Began,
    Checkpointed,
    Confirming,
    Enqueued,
    Event,
    Extended,
    Finished,
    History,
    Prepared,
    Reported,
    Retried,
    Suggested,
    Tracked,
    event_from_dict,
    event_to_dict,
)
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = st.integers(0, 1000)
TEXTS = st.text(max_size=20)
SETTINGS = st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS)
EVENTS: dict[type, st.SearchStrategy[Event]] = {
    Began: st.builds(Began, TEXTS, SETTINGS, TEXTS, TEXTS),
    Extended: st.builds(Extended, NUMBERS),
    Enqueued: st.builds(Enqueued, st.lists(SETTINGS, max_size=3)),
    Confirming: st.builds(Confirming, st.lists(st.dictionaries(TEXTS, NUMBERS), max_size=3)),
    Prepared: st.builds(Prepared, TEXTS, TEXTS, st.floats(0, 1)),
    Suggested: st.builds(
        Suggested,
        NUMBERS,
        st.sampled_from(["search", "control", "confirm"]),
        TEXTS,
        SETTINGS,
        st.dictionaries(TEXTS, TEXTS),
        SETTINGS,
        SETTINGS,
    ),
    Reported: st.builds(
        Reported,
        NUMBERS,
        NUMBERS,
        st.dictionaries(TEXTS, st.floats(allow_nan=False)),
        st.sampled_from([None, "continue", "stop"]),
    ),
    Checkpointed: st.builds(Checkpointed, NUMBERS, NUMBERS, TEXTS),
    Retried: st.builds(Retried, NUMBERS, NUMBERS, TEXTS),
    Finished: st.builds(Finished, NUMBERS, st.sampled_from(["completed", "pruned", "failed"]), TEXTS, TEXTS),
    Tracked: st.builds(Tracked, NUMBERS, TEXTS),
}


@pytest.mark.parametrize("kind", get_args(Event))
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_event_survives_the_way_through_json(kind: type, data: st.DataObject) -> None:
    event = data.draw(EVENTS[kind])
    assert event_from_dict(json.loads(json.dumps(event_to_dict(event)))) == event


def test_time_of_a_journaled_event_is_not_part_of_it() -> None:
    assert event_from_dict({**event_to_dict(Extended(3)), "time": 1.5}) == Extended(3)


def test_reading_an_event_leaves_its_content_as_it_was() -> None:
    content = event_to_dict(Extended(3))
    event_from_dict(content)
    assert content == {"event": "extended", "trials": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"event": "explosion"}, "there is no event 'explosion'"),
        ({"trials": 3}, "there is no event None"),
        ({"event": "extended"}, "a extended has other fields: .*'trials'"),
        ({"event": "extended", "trials": 3, "color": "red"}, "a extended has other fields: .*'color'"),
    ],
)
def test_unknown_event_is_refused(content: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        event_from_dict(content)


@pytest.fixture
def history(suggested: Callable[..., Suggested]) -> History:
    """Two trials, 1 and 2, that have been suggested."""
    history = History()
    for number in (2, 1):
        history.apply(suggested(number))
    return history


def test_last_report_is_that_of_the_latest_epoch(history: History) -> None:
    for epoch in (1, 8, 3):
        history.apply(Reported(1, epoch, {}, None))
    last = history.trials[1].last
    assert last is not None
    assert last.epoch == 8


def test_trial_without_reports_has_no_last_one(history: History) -> None:
    assert history.trials[1].last is None


@pytest.mark.parametrize(("decision", "stopped"), [("stop", True), ("continue", False), (None, False)])
def test_trial_is_stopped_by_a_decision(history: History, decision: str | None, stopped: bool) -> None:
    history.apply(Reported(1, 8, {}, decision))  # type: ignore[arg-type]
    history.apply(Reported(1, 9, {}, None))
    assert history.trials[1].stopped is stopped


def test_unfinished_trials_come_in_the_order_of_their_numbers(history: History) -> None:
    assert [trial.number for trial in history.unfinished()] == [1, 2]


def test_finished_trials_are_not_unfinished(history: History) -> None:
    history.apply(Finished(1, "failed", "it broke"))
    assert [trial.number for trial in history.unfinished()] == [2]


def test_outcomes_are_counted(history: History) -> None:
    history.apply(Finished(1, "pruned", ""))
    assert history.outcomes() == {"completed": 0, "pruned": 1, "failed": 0}


def test_latest_checkpoint_counts(history: History) -> None:
    for epoch in (8, 16):
        history.apply(Checkpointed(1, epoch, f"at {epoch}"))
    assert history.trials[1].checkpoint == Checkpointed(1, 16, "at 16")


def test_extensions_add_up(history: History) -> None:
    for trials in (3, 4):
        history.apply(Extended(trials))
    assert history.additions == [Extended(3), Extended(4)]


def test_run_0_is_the_parent_s(history: History) -> None:
    history.apply(Tracked(0, "parent"))
    history.apply(Tracked(1, "child"))
    assert (history.parent_run_id, history.trials[1].run_id) == ("parent", "child")


@pytest.mark.parametrize(
    "event", [Reported(3, 1, {}, None), Checkpointed(3, 1, "there"), Finished(3, "failed", ""), Tracked(3, "run")]
)
def test_event_of_a_trial_never_suggested_is_refused(history: History, event: Event) -> None:
    with pytest.raises(ValueError, match="trial 3 was never suggested"):
        history.apply(event)


def test_second_suggestion_of_a_number_is_refused(history: History, suggested: Callable[..., Suggested]) -> None:
    with pytest.raises(ValueError, match="trial 1 is suggested twice"):
        history.apply(suggested(1))
