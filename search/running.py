"""One process at a time works on a search."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..models.errors import InputError


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Holds a search's folder, which is named after the search; the system lets go of it when the process dies.

    Raises:
        InputError: another process works on it.
    """
    # The folder itself is locked: nothing is left in it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"the search {folder.name} is running; wait for its end, or stop it, before it is resumed or extended"
            ) from error
        yield
    finally:
        os.close(descriptor)
