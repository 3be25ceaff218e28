"""When a search is hopeless."""

from .events import Event, Finished


class FailureBudget:
    """Counts failed trials in a row, from the launch on: a resumed search, which somebody has mended, starts anew.

    Args:
        most: after so many the search is given up.
    """

    def __init__(self, most: int) -> None:
        self._most, self._in_a_row = most, 0
        self.last_error = ""

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
