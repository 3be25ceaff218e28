"""Ray for the length of a command: joined at an address, or started embedded and stopped again."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray

from ..models.errors import InputError
from .collector import collect_as_usual

# What a cluster's head takes at most to take a connection.
ANSWER_SECONDS = 5.0


@contextmanager
def ray_session(address: str | None, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster at `address` (or `RAY_ADDRESS`), or starts Ray on this machine; leaves or stops it at the end.

    Args:
        address: of a cluster; None: `RAY_ADDRESS`, else this machine.
        dashboard: whether what is started has Ray's dashboard, and with it the interface that tells of actors.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    collect_as_usual()
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    answers = _answers(place)
    if answers is False:
        raise InputError(f"there is no Ray cluster at {place}: nothing answers; leave --address out to start one")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with_dashboard = dashboard if place == "local" else None
        ray.init(place, include_dashboard=with_dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if answers:
            raise InputError(
                f"what answers at {place} lets nobody in ({reason}); a Ray cluster may ask for its token, which "
                "docs/cluster.md says how to give, and for its own version of Ray"
            ) from error
        raise InputError(f"there is no Ray cluster at {place} ({reason}); leave --address out to start one") from error
    except Exception as error:
        # Ray's type for it is Exception itself.
        if "timed out during startup" not in str(error):
            raise
        raise InputError(
            "Ray has not started within its 30 s, for other work keeps this machine busy; try again, or give --address"
        ) from error
    finally:
        # Ray puts a handler of its own in, which would end the process before anything is saved.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    # Ray writes what it has to say of a worker that died to standard output, which may be for one JSON document, and
    # some of it when it is shut down.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def _answers(place: str) -> bool | None:
    """Whether something listens at HOST:PORT: Ray itself tries for minutes. None if `place` is something else."""
    host, colon, port = place.rpartition(":")
    if not colon or "//" in place or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True


def living_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each node that is up."""
    return [node for node in ray.nodes() if node["Alive"]]


def is_here_alone(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these nodes are the one that this process is on, and no other."""
    return {node["NodeID"] for node in nodes} == {ray.get_runtime_context().get_node_id()}


def cluster_cpus() -> float:
    """CPUs of all nodes."""
    return float(ray.cluster_resources().get("CPU", 0))


def cluster_gpus() -> float:
    """GPUs of all nodes."""
    return float(ray.cluster_resources().get("GPU", 0))


def free_resources() -> dict[str, float]:
    """CPUs and GPUs that nothing holds at present."""
    free = ray.available_resources()
    return {kind: float(free.get(kind, 0)) for kind in ("CPU", "GPU")}


def wait_for_resources(wanted: dict[str, float], seconds: float = 60) -> None:
    """Waits until as much is free again as `free_resources` once said; Tune would wait for ever.

    What went with a node that died is not waited for.

    Raises:
        TimeoutError: something holds on to it.
    """
    deadline = time.monotonic() + seconds
    while _is_held(free := free_resources(), wanted):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"after {seconds:g} s only {free['CPU']:g} of {wanted['CPU']:g} CPUs and {free['GPU']:g} of "
                f"{wanted['GPU']:g} GPUs are free; something else runs on this Ray cluster"
            )
        time.sleep(0.05)


def _is_held(free: dict[str, float], wanted: dict[str, float]) -> bool:
    there = ray.cluster_resources()
    # The smallest step of a share is 0.0001.
    return any(free[kind] < min(amount, float(there.get(kind, 0))) - 1e-6 for kind, amount in wanted.items())
