"""Notices that Ray has ended on this machine: a driver that waits for a trial to begin is not told."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from .ray_session import living_nodes

LOOKS_EVERY_S = 2.0
# Without an answer for so long Ray's control store is gone; after 60 s of it Ray ends the driver, with nothing saved.
SILENT_S = 20.0


@contextmanager
def ray_watched(on_end: Callable[[], None]) -> Iterator[None]:
    """Calls `on_end` once, from another thread, if this machine's Ray ends before the block does.

    Ray must be running.
    """
    own, over, answered = ray.get_runtime_context().get_node_id(), threading.Event(), [time.monotonic()]

    def ask() -> None:
        # With the control store gone this stays in Ray.
        while not over.is_set() and own in {node["NodeID"] for node in living_nodes()}:
            answered[0] = time.monotonic()
            over.wait(LOOKS_EVERY_S)
        if not over.is_set():
            answered[0] = float("-inf")

    def watch() -> None:
        while not over.wait(LOOKS_EVERY_S):
            if time.monotonic() - answered[0] > SILENT_S:
                on_end()
                return

    asking = threading.Thread(target=ask, name="ray-asked", daemon=True)
    threads = (asking, threading.Thread(target=watch, name="ray-watched", daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(LOOKS_EVERY_S)
