"""When a search ends early: it is hopeless, or there is no room for it."""

from .events import Event, Finished


class FailureBudget:
    """Counts failed trials in a row, from the launch on: a resumed search, which somebody has mended, starts anew.

    Args:
        most: after so many the search is given up.
    """

    def __init__(self, most: int) -> None:
        self._most, self._in_a_row = most, 0
        self.last_error = ""
        # What a trial said of a full disk, and of data that it could not read.
        self.no_room = self.not_shared = ""

    def on_event(self, event: Event) -> None:
        """Hears of a live event."""
        if isinstance(event, Finished):
            failed = event.outcome == "failed"
            self._in_a_row = self._in_a_row + 1 if failed else 0
            self.last_error = event.error if failed else self.last_error

    @property
    def spent(self) -> bool:
        """Whether the search is to be given up."""
        return self._in_a_row >= self._most

    @property
    def ends_early(self) -> bool:
        """Whether no trial goes on and none is begun."""
        return self.spent or bool(self.no_room or self.not_shared)
