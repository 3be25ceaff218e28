"""When a search is given up."""

from collections.abc import Callable

import pytest
from hintsearch.search.events import Finished, Outcome, Retried, Suggested
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog, read_journal


def heard(most: int, *outcomes: Outcome) -> FailureBudget:
    """A budget after trials that ended like this."""
    budget = FailureBudget(most)
    for number, outcome in enumerate(outcomes, start=1):
        budget.on_event(Finished(number, outcome, f"trial {number} broke" if outcome == "failed" else ""))
    return budget


@pytest.mark.parametrize(
    ("outcomes", "spent"),
    [
        ([], False),
        (["failed", "failed"], False),
        (["failed", "failed", "failed"], True),
        (["completed", "failed", "failed", "failed"], True),
        # In a row only.
        (["failed", "failed", "completed", "failed", "failed"], False),
        (["failed", "failed", "pruned", "failed"], False),
    ],
)
def test_failures_in_a_row_spend_the_budget(outcomes: list[Outcome], spent: bool) -> None:
    assert heard(3, *outcomes).spent is spent


def test_last_failure_says_why() -> None:
    assert heard(3, "failed", "failed").last_error == "trial 2 broke"


def test_retry_is_no_failed_trial() -> None:
    budget = FailureBudget(1)
    budget.on_event(Retried(1, 1, "it broke"))
    assert not budget.spent


def test_failures_before_a_resume_do_not_count(log: SearchLog, suggested: Callable[..., Suggested]) -> None:
    """Who resumes has mended what broke."""
    for number in (1, 2):
        log.record(suggested(number))
        log.record(Finished(number, "failed", "it broke"))
    resumed = SearchLog(log.path)
    resumed.replay(read_journal(log.path).events, torn=0)
    budget = FailureBudget(2)
    resumed.listen(budget)
    resumed.record(suggested(3))
    resumed.record(Finished(3, "failed", "it broke"))
    assert not budget.spent
