"""What a trial reports to Tune: its epochs, those of a moment together."""

from time import monotonic
from typing import Any

from ray import tune

# Each report makes the trial wait for the driver, which takes processor time from it on a machine that is busy: with
# epochs of a tenth of a second that would be a tenth of the search.
REPORT_SECONDS = 1.0
# Key of the figures in a report. In a list, for of each number that stands by itself Tune keeps six statistics in the
# driver as long as the search runs: 90 kB a trial.
EPOCHS = "epochs"
# Keys of what a trial reports in the place of an epoch that ends the search, and not the trial, which a resume begins
# again: it finds no room for its checkpoint, or cannot read what all trials share.
NO_ROOM, NOT_SHARED = "no_room", "not_shared"


class EpochReports:
    """Reports epochs to Tune, at most once a second unless one is due; all are reported before a failure is."""

    def __init__(self) -> None:
        self._held: list[dict[str, Any]] = []
        self._reported = monotonic()

    def add(self, figures: dict[str, Any]) -> None:
        """Takes in an epoch."""
        self._held.append(figures)

    @property
    def due(self) -> bool:
        """Whether the last report is a second old."""
        return monotonic() - self._reported >= REPORT_SECONDS

    def send(self, **more: Any) -> None:
        """Reports what there is; does not return if Tune stops the trial.

        Args:
            **more: a checkpoint of the last epoch, for `tune.report`.
        """
        if self._held:
            self._report(self._held, **more)

    def fail(self, why: dict[str, Any]) -> None:
        """Reports that the trial cannot go on, after what there is."""
        self._report([*self._held, why])

    def _report(self, epochs: list[dict[str, Any]], **more: Any) -> None:
        tune.report({EPOCHS: epochs}, **more)
        # Not before: where a checkpoint finds no room, nothing has been reported.
        self._held = []
        self._reported = monotonic()
