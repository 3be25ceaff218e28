"""Notices that Ray has ended on this machine: a driver that waits for a trial to begin is not told."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray

from .ray_session import living_nodes

LOOKS_EVERY_S = 2.0
# So many looks without an answer, and Ray's control store is gone; after 60 s of it Ray ends the driver, with nothing
# saved. Looks are counted, not seconds: a process that was stopped meanwhile has not looked.
SILENT_LOOKS = 10


@contextmanager
def ray_watched(on_end: Callable[[], None]) -> Iterator[None]:
    """Calls `on_end` once, from another thread, if this machine's Ray ends before the block does.

    Ray must be running.
    """
    own, over = ray.get_runtime_context().get_node_id(), threading.Event()
    answered, ended = threading.Event(), threading.Event()

    def ask() -> None:
        # Ray raises what it likes: whatever it is, it does not answer. With the control store gone this stays in Ray.
        with suppress(Exception):
            while own in {node["NodeID"] for node in living_nodes()}:
                answered.set()
                if over.wait(LOOKS_EVERY_S):
                    return
        ended.set()

    def watch() -> None:
        silent = 0
        while not over.wait(LOOKS_EVERY_S):
            silent = 0 if answered.is_set() else silent + 1
            answered.clear()
            if ended.is_set() or silent >= SILENT_LOOKS:
                on_end()
                return

    threads = [threading.Thread(target=work, name=f"ray-{work.__name__}", daemon=True) for work in (ask, watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(LOOKS_EVERY_S)
