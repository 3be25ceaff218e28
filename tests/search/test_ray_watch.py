"""When the end of Ray on this machine is noticed."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hintsearch.search import ray_watch
from hintsearch.search.ray_session import living_nodes
from hintsearch.search.ray_watch import SILENT_LOOKS, ray_watched

LOOKS_EVERY_S = 0.04

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """How often the end is told while Ray answers like this, over three times as many looks as it takes."""
    monkeypatch.setattr(ray_watch, "LOOKS_EVERY_S", LOOKS_EVERY_S)

    def count(answer: Callable[[], Any]) -> int:
        told: list[str] = []
        monkeypatch.setattr(ray_watch, "living_nodes", answer)
        with ray_watched(lambda: told.append(threading.current_thread().name)):
            time.sleep(3 * SILENT_LOOKS * LOOKS_EVERY_S)
        assert threading.current_thread().name not in told
        return len(told)

    return count


def test_ray_that_lives_is_no_end(ends: Callable[[Callable[[], Any]], int]) -> None:
    assert ends(living_nodes) == 0


def test_node_that_is_gone_is_the_end_and_told_once(ends: Callable[[Callable[[], Any]], int]) -> None:
    assert ends(lambda: [{"NodeID": "another"}]) == 1


def test_silence_is_the_end(ends: Callable[[Callable[[], Any]], int]) -> None:
    silent = threading.Event()
    assert ends(silent.wait) == 1
    silent.set()


def test_ray_that_refuses_to_answer_is_the_end(ends: Callable[[Callable[[], Any]], int]) -> None:
    def refuse() -> None:
        raise ConnectionError

    assert ends(refuse) == 1


def test_slow_answer_is_no_end(ends: Callable[[Callable[[], Any]], int]) -> None:
    own = living_nodes()

    def slow() -> Any:
        time.sleep(2 * LOOKS_EVERY_S)
        return own

    assert ends(slow) == 0
