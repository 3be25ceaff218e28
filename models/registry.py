"""Names for what a study can choose from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import InputError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing.

    Attributes:
        name: what a study calls it.
        item: the function or class itself.
        source: authors, year and arXiv id, or where it comes from.
        facts: declared properties (kind, range, needs, ...), shown by the command that lists the registry.
    """

    name: str
    item: T
    source: str
    facts: dict[str, str]


class Registry(Generic[T]):
    """Maps names to things of one kind; a wrong name is an `InputError` with the nearest right one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, source: str, **facts: str) -> Callable[[T], T]:
        """Decorates a function or class with its name, source and declared facts."""

        def add(item: T) -> T:
            if name in self._entries:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, item, source, facts)
            return item

        return add

    def entry(self, name: str) -> Entry[T]:
        """The entry of that name.

        Raises:
            InputError: no such name.
        """
        if name not in self._entries:
            raise InputError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]

    def get(self, name: str) -> T:
        """The thing of that name; raises `InputError` like `entry`."""
        return self.entry(name).item

    def names(self) -> tuple[str, ...]:
        """All names in the order of registration."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
