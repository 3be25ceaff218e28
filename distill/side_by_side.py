"""Several students on one stream of batches, some at a time: each worker thread trains its share of them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

AHEAD = 2

Item = TypeVar("Item")
Made = TypeVar("Made")


class SharedStream(Generic[Item, Made]):
    """A stream that several threads read in step; each item is taken, and made into something, once.

    A thread that would have to wait for what another is making makes the next item instead, so that all are busy; but
    no thread gets further ahead of the slowest than `AHEAD` items a reader, for what waits for it is kept.

    Args:
        items: taken in order, by one thread at a time.
        make: what is made of an item; it may run in several threads at once.
        readers: how many threads read the whole stream.
    """

    def __init__(self, items: Iterator[Item], make: Callable[[Item], Made], readers: int) -> None:
        self._items, self._make, self._readers = items, make, readers
        self._changed = threading.Condition()
        self._claimed = 0
        self._forgotten = 0
        self._length: int | None = None
        self._made: dict[int, Made] = {}
        self._read: dict[int, int] = {}
        self._error: BaseException | None = None

    def read(self) -> Iterator[Made]:
        """Every item's product, in order.

        Raises:
            BaseException: whatever went wrong in taking or making, in every reader.
        """
        position = 0
        while self._reaches(position):
            yield self._take(position)
            position += 1

    def fail(self, error: BaseException) -> None:
        """Ends all readers with an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _reaches(self, position: int) -> bool:
        """Whether there is an item of that number; makes it, or a later one, while it is not there."""
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if self._length is not None and position >= self._length:
                    return False
                if position in self._made:
                    return True
                ahead, waiting = self._claimed - position, self._claimed - self._forgotten
                if self._length is not None or ahead >= self._readers or waiting >= AHEAD * self._readers:
                    self._changed.wait()
                    continue
                claimed = self._claim()
            if claimed is not None:
                self._produce(*claimed)

    def _claim(self) -> tuple[int, Item] | None:
        """The next item, with its number; None after the last. The lock is held: items are taken one by one."""
        try:
            item = next(self._items)
        except StopIteration:
            self._length = self._claimed
            self._changed.notify_all()
            return None
        except BaseException as error:
            self._error = error
            self._changed.notify_all()
            raise
        self._claimed += 1
        return self._claimed - 1, item

    def _produce(self, number: int, item: Item) -> None:
        try:
            made = self._make(item)
        except BaseException as error:
            self.fail(error)
            raise
        with self._changed:
            self._made[number] = made
            self._changed.notify_all()

    def _take(self, position: int) -> Made:
        """The product of that number; forgotten when the last reader has it."""
        with self._changed:
            made = self._made[position]
            self._read[position] = self._read.get(position, 0) + 1
            if self._read[position] == self._readers:
                del self._made[position], self._read[position]
                self._forgotten += 1
                self._changed.notify_all()
            return made


def for_all(items: Iterable[Item], make: Callable[[Item], Made], shares: Sequence[Callable[[Made], None]]) -> None:
    """Hands what is made of every item, in order, to each share; a thread a share, if there are several.

    Each thread computes with as many torch threads as the caller, so results are those of one after the other.

    Raises:
        BaseException: the first error of any of them; the others end.
    """
    if len(shares) == 1:
        for item in items:
            shares[0](make(item))
        return
    stream = SharedStream(iter(items), make, len(shares))

    def run(share: Callable[[Made], None]) -> None:
        try:
            for made in stream.read():
                share(made)
        except BaseException as error:
            stream.fail(error)
            raise

    with _pool(len(shares)) as pool:
        futures = [pool.submit(run, share) for share in shares]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            # A Ctrl-C comes here, in the main thread: the others must not go on.
            stream.fail(error)
            raise


def at_once(work: Callable[[Item], Made], items: Sequence[Item], threads: int) -> list[Made]:
    """What `work` makes of each item, some at a time."""
    if threads == 1:
        return [work(item) for item in items]
    with _pool(threads) as pool:
        return list(pool.map(work, items))


def _pool(threads: int) -> ThreadPoolExecutor:
    # Torch keeps the number of its threads per thread.
    return ThreadPoolExecutor(threads, "students", torch.set_num_threads, (torch.get_num_threads(),))
