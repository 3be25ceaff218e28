"""What all trials read, as a file of the search's folder that each machine maps into memory once.

Not in Ray's object store: when the Ray daemon of the driver's node ends, by a signal to a whole job or for want of
memory, Ray looks for what the driver has put there, and ends the driver on the spot, with nothing saved and runs open.
"""

import hashlib
import mmap
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray import cloudpickle

from ..models.errors import reason
from ..models.files import replacing
from .epoch_reports import NOT_SHARED, EpochReports

# Of arrays, as numpy and torch like it.
_ALIGNMENT = 64
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class SharedFile:
    """Where something is shared.

    Attributes:
        path: in the shared storage.
        size: of the file, in bytes.
        sha256: of what is unpickled; the arrays behind it are bytes only.
    """

    path: str
    size: int
    sha256: str

    def read(self) -> Any:
        """What was shared, the same at every call of a process; its arrays are read-only and lie in the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not what was written.
        """
        return _read(self)


@contextmanager
def shared(value: Any, path: Path) -> Iterator[SharedFile]:
    """Shares a value in a file until the end of the context.

    Args:
        value: large arrays in it are not copied.
        path: in storage that all nodes see; what an earlier search has left there is replaced.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    head = pickle.dumps(([array.nbytes for array in arrays], pickled))
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(len(head).to_bytes(_LENGTH_BYTES))
            file.write(head)
            for array in arrays:
                file.seek(_aligned(file.tell()))
                file.write(array)
        yield SharedFile(str(path.resolve()), path.stat().st_size, hashlib.sha256(head).hexdigest())
    finally:
        path.unlink(missing_ok=True)


def reading(trainable: Callable[[dict[str, Any], Any], None], file: SharedFile) -> Callable[[dict[str, Any]], None]:
    """The trainable with what is shared as its second argument.

    If that cannot be read, the trial reports it as `NOT_SHARED`: it ends the search, and is no failure of the trial.
    """

    def with_shared(config: dict[str, Any]) -> None:
        try:
            value = file.read()
        except (OSError, ValueError) as error:
            EpochReports().fail({NOT_SHARED: reason(error)})
            return
        trainable(config, value)

    return with_shared


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


@lru_cache(maxsize=1)
def _read(file: SharedFile) -> Any:
    with Path(file.path).open("rb") as opened:
        changed = ValueError(f"{file.path} was changed by something else than the search")
        if os.fstat(opened.fileno()).st_size != file.size:
            raise changed
        content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES])
    head = content[_LENGTH_BYTES:end]
    if hashlib.sha256(head).hexdigest() != file.sha256:
        raise changed
    sizes, pickled = pickle.loads(head)
    arrays, start = [], end
    for size in sizes:
        start = _aligned(start)
        arrays.append(content[start : start + size])
        start += size
    return pickle.loads(pickled, buffers=arrays)
