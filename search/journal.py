"""The journal: one JSON line an event, on disk before the event takes effect. The source of truth of a search.

Each line ends with a checksum of itself and of all before it: a changed, a missing and an exchanged one are found.
"""

import json
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..models.errors import InputError
from .events import Event, History, event_from_dict, event_to_dict

# Before the checksum of a line, which is CRC-32 of what stands before this, begun with the checksum of the line before.
CHECKSUM = b', "crc": "'


class Listener(Protocol):
    """Something that follows a search."""

    def on_event(self, event: Event) -> None:
        """Called in order for every event, live or replayed, after it is journaled and in the history."""


@dataclass(frozen=True)
class JournalContent:
    """What a journal holds.

    Attributes:
        events: in order.
        torn: the bytes of a last line that was cut off in the middle of writing; they are dropped.
    """

    events: tuple[Event, ...]
    torn: int


def read_journal(path: Path) -> JournalContent:
    """Reads a journal without changing it.

    Raises:
        InputError: no such file, or a damaged line, which is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"there is no journal {path}; give --name the name of a search in this storage") from error
    whole, _, torn = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    events: list[Event] = []
    replayed, checksum = History(), 0
    for number, line in enumerate(lines, start=1):
        try:
            event = event_from_dict(json.loads(line))
            checksum = _checked(line, checksum)
            replayed.apply(event)
        except (ValueError, UnicodeDecodeError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is damaged in line {number} ({error}); restore the file from a copy, or start a new search"
            ) from error
        events.append(event)
    return JournalContent(tuple(events), len(torn))


class SearchLog:
    """Journals events, applies them to the history and tells the listeners, in this order.

    Args:
        path: of the journal; created with the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History()
        self._events: list[Event] = []
        # Of the last line; None: it is still to be read.
        self._checksum: int | None = None
        self._listeners: list[Listener] = []
        # Why the last event that found no place was not written.
        self.broken: OSError | None = None
        # The MLflow writer journals run ids from a thread of its own.
        self._lock = threading.RLock()

    def listen(self, listener: Listener, from_start: bool = False) -> None:
        """Adds a listener to live events; `from_start` tells it of all earlier ones first."""
        with self._lock:
            for event in self._events if from_start else ():
                listener.on_event(event)
            self._listeners.append(listener)

    def record(self, event: Event) -> None:
        """Journals a live event (fsynced) and lets it take effect.

        Raises:
            OSError: it could not be written, on a full disk for example; it has no effect then.
        """
        with self._lock:
            content = json.dumps({**event_to_dict(event), "time": round(time.time(), 3)}).encode()[:-1]
            new = not self.path.exists()
            if self._checksum is None:
                self._checksum = 0 if new else _last_checksum(self.path)
            checksum = zlib.crc32(content, self._checksum)
            try:
                _append(self.path, content + CHECKSUM + b'%08x"}\n' % checksum)
                # Also where the folder is not synced: the line stands there, and the next one follows it.
                self._checksum = checksum
                if new:
                    _sync_folder(self.path.parent)
            except OSError as error:
                self.broken = error
                raise
            self._take_effect(event)

    def replay(self, events: Sequence[Event], torn: int) -> None:
        """Lets journaled events take effect again, after cutting off a torn last line."""
        with self._lock:
            if torn:
                with self.path.open("r+b") as file:
                    file.truncate(self.path.stat().st_size - torn)
                    os.fsync(file.fileno())
            for event in events:
                self._take_effect(event)

    def _take_effect(self, event: Event) -> None:
        self.history.apply(event)
        self._events.append(event)
        for listener in self._listeners:
            listener.on_event(event)


def _checked(line: bytes, before: int) -> int:
    """The checksum of a line.

    Raises:
        ValueError: it is another one than the line says.
    """
    content, mark, said = line.rpartition(CHECKSUM)
    if not mark:
        raise ValueError("it has no checksum")
    checksum = zlib.crc32(content, before)
    if said != b'%08x"}' % checksum:
        raise ValueError("its checksum is wrong: it was changed, or a line before it is missing")
    return checksum


def _last_checksum(path: Path) -> int:
    """What the last line of a journal says, which has been read and checked."""
    _, _, said = path.read_bytes().rpartition(CHECKSUM)
    return int(said[:8], 16)


def _append(path: Path, line: bytes) -> None:
    """Writes a line whole or not at all: on a full disk no later one may follow a torn one."""
    # Unbuffered: what a buffer keeps after an error is written when the file is closed.
    with path.open("ab", buffering=0) as file:
        start = os.fstat(file.fileno()).st_size
        try:
            written = file.write(line)
            if written != len(line):
                # The rest has no room; asking again says why.
                file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name durable, not only its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
