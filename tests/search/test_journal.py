import json
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.events import Event, Extended, Finished, Reported, Suggested, event_to_dict
from hintsearch.search.journal import SearchLog, read_journal

DIES_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from hintsearch.search.events import Extended
from hintsearch.search.journal import SearchLog

log = SearchLog(Path(sys.argv[1]))
for trials in (1, 2, 3):
    log.record(Extended(trials))
with log.path.open("ab") as file:
    file.write(b'{"event": "exten')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Follower:
    """Notes the events it hears of, and what the journal holds at that moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self.lines: list[int] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self.lines.append(self.path.read_bytes().count(b"\n") if self.path.exists() else 0)


@pytest.fixture
def events(suggested: Callable[..., Suggested]) -> list[Event]:
    return [
        suggested(1),
        Reported(1, 8, {"val_accuracy": 0.1}, "stop"),
        Finished(1, "pruned", ""),
        suggested(2, "kd_only"),
    ]


@pytest.fixture
def journal(log: SearchLog, events: list[Event]) -> Path:
    """A journal of four lines."""
    for event in events:
        log.record(event)
    return log.path


def damage(journal: Path, line: int, content: bytes) -> None:
    lines = journal.read_bytes().split(b"\n")
    lines[line - 1] = content
    journal.write_bytes(b"\n".join(lines))


def test_journal_gives_back_what_was_recorded(journal: Path, events: list[Event]) -> None:
    content = read_journal(journal)
    assert (list(content.events), content.torn) == (events, 0)


def test_each_event_is_one_json_line_with_its_time(journal: Path) -> None:
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["suggestion", "report", "outcome", "suggestion"]
    assert all(line["time"] > 1.7e9 for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        # What is still a journal of the right events.
        lambda lines: [*lines[:1], lines[1].replace(b"0.1", b"0.9"), *lines[2:]],
        lambda lines: [*lines[:1], lines[1].replace(b'"epoch": 8', b'"epoch": "8"'), *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[3], *lines[1:3]],
    ],
    ids=["another figure", "another type", "a line is missing", "lines are exchanged"],
)
def test_trap_5_line_that_was_changed_or_has_lost_another_is_named(
    journal: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(InputError, match=r"is damaged in line 2 \(its checksum is wrong: it was changed, or a line "):
        read_journal(journal)


def test_resumed_log_goes_on_with_the_checksums(journal: Path, events: list[Event]) -> None:
    resumed = SearchLog(journal)
    resumed.replay(read_journal(journal).events, torn=0)
    for trials in (1, 2):
        resumed.record(Extended(trials))
    assert list(read_journal(journal).events) == [*events, Extended(1), Extended(2)]


def test_line_is_on_disk_after_each_record(log: SearchLog, events: list[Event]) -> None:
    for count, event in enumerate(events, start=1):
        log.record(event)
        assert list(read_journal(log.path).events) == events[:count]


def test_line_is_on_disk_before_a_listener_hears_of_the_event(log: SearchLog, events: list[Event]) -> None:
    follower = Follower(log.path)
    log.listen(follower)
    for event in events:
        log.record(event)
    assert follower.lines == [1, 2, 3, 4]


def test_event_is_in_the_history_before_a_listener_hears_of_it(log: SearchLog, events: list[Event]) -> None:
    class Looker:
        def on_event(self, event: Event) -> None:
            seen.append(len(log.history.trials))

    seen: list[int] = []
    log.listen(Looker())
    log.record(events[0])
    assert seen == [1]


def test_listener_from_start_hears_of_earlier_events_first(log: SearchLog, events: list[Event]) -> None:
    log.record(events[0])
    follower = Follower(log.path)
    log.listen(follower, from_start=True)
    log.record(events[1])
    assert follower.events == events[:2]


def test_other_listener_hears_of_later_events_only(log: SearchLog, events: list[Event]) -> None:
    log.record(events[0])
    follower = Follower(log.path)
    log.listen(follower)
    log.record(events[1])
    assert follower.events == events[1:2]


def test_replayed_events_take_effect_and_are_not_written_again(
    tmp_path: Path, journal: Path, events: list[Event]
) -> None:
    before = journal.read_bytes()
    log, follower = SearchLog(journal), Follower(journal)
    log.listen(follower)
    log.replay(events, torn=0)
    assert follower.events == events
    assert log.history.trials[1].finished == Finished(1, "pruned", "")
    assert journal.read_bytes() == before


def test_several_threads_write_whole_lines(log: SearchLog) -> None:
    threads = [
        threading.Thread(target=lambda: [log.record(Extended(1)) for _ in range(20)])  # type: ignore[func-returns-value]
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_journal(log.path).events) == 80
    assert log.history.additions == [Extended(1)] * 80


def test_trap_5_torn_last_line_is_left_out_and_its_bytes_said(journal: Path, events: list[Event]) -> None:
    with journal.open("ab") as file:
        file.write(b'{"event": "outc')
    content = read_journal(journal)
    assert (list(content.events), content.torn) == (events, 15)


def test_trap_5_reading_does_not_change_the_journal(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + b'{"event": "outc')
    before = journal.read_bytes()
    read_journal(journal)
    assert journal.read_bytes() == before


def test_trap_5_replay_cuts_the_torn_line_off_so_that_the_next_one_is_whole(journal: Path, events: list[Event]) -> None:
    with journal.open("ab") as file:
        file.write(b'{"event": "outc')
    content = read_journal(journal)
    log = SearchLog(journal)
    log.replay(content.events, content.torn)
    log.record(Finished(2, "completed", ""))
    assert list(read_journal(journal).events) == [*events, Finished(2, "completed", "")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"event": "rep', "Unterminated string"),
        (b"", "Expecting value"),
        (b"\x00\x00\x00", "Expecting value"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"[]", ""),
        (b"3", ""),
        (b'{"event": "explosion"}', "there is no event 'explosion'"),
        (b'{"event": "report", "number": 1}', "a report has other fields"),
    ],
)
def test_trap_5_damaged_line_is_an_error_that_names_it(journal: Path, content: bytes, reason: str) -> None:
    damage(journal, 2, content)
    with pytest.raises(InputError) as caught:
        read_journal(journal)
    message = str(caught.value)
    assert message.startswith(f"{journal} is damaged in line 2 (")
    assert reason in message
    assert message.endswith("); restore the file from a copy, or start a new search")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("again", "reason"),
    [
        (lambda events: events[0], "trial 1 is suggested twice"),
        (lambda _: Reported(7, 1, {}, None), "trial 7 was never"),
    ],
)
def test_trap_5_event_that_contradicts_those_before_is_an_error_that_names_its_line(
    journal: Path, events: list[Event], again: Callable[[list[Event]], Event], reason: str
) -> None:
    content = json.dumps(event_to_dict(again(events)))[:-1].encode()
    before = int(json.loads(journal.read_bytes().splitlines()[-1])["crc"], 16)
    with journal.open("ab") as file:
        file.write(content + b', "crc": "%08x"}\n' % zlib.crc32(content, before))
    with pytest.raises(InputError, match=rf"damaged in line 5 \({reason}"):
        read_journal(journal)


def test_trap_32_killed_process_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    ended = subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING, str(path)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    content = read_journal(path)
    assert (content.events, content.torn) == ((Extended(1), Extended(2), Extended(3)), 16)


def test_missing_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_journal(tmp_path / "journal.jsonl")
    assert str(caught.value) == (
        f"there is no journal {tmp_path}/journal.jsonl; give --name the name of a search in this storage"
    )


def test_empty_journal_has_no_events(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.touch()
    assert read_journal(path).events == ()


def test_text_in_every_script_survives(log: SearchLog, suggested: Callable[..., Suggested]) -> None:
    event = replace(suggested(1), parameters={"lösung": "提示 \u2028 \x00"})
    log.record(event)
    assert read_journal(log.path).events == (event,)
