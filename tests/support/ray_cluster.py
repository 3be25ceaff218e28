"""A real Ray cluster on this machine that is there before a command and after it, by `ray start`."""

import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from processes import Family, ended, wait_for


class RayCluster:
    """A head, and nodes that come and go; each is a family of processes of its own.

    Args:
        folder: short, for Ray keeps its sockets there.
        cpus: of the head.
        gpus: of the head, made up.
        dashboard: whether it has one.
        environment: further variables of all its nodes.
    """

    def __init__(
        self,
        folder: Path,
        cpus: int = 1,
        gpus: int = 0,
        dashboard: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port, dashboard_port = _free_ports(2)
        # What a driver needs to join.
        self.environment = {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # As in the command line's own Ray: no worker is started that nothing asks for.
            "RAY_prestart_worker_first_driver": "0",
            **(environment or {}),
        }
        self.address = f"127.0.0.1:{port}"
        self._folder = folder
        self._nodes: list[Family] = []
        here = f"--num-cpus={cpus}", f"--num-gpus={gpus}"
        shown = f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"
        self.head = self._start("--head", f"--port={port}", *shown, *here)

    def add(
        self, cpus: int = 1, gpus: int = 0, inside: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Family:
        """A further node.

        Args:
            cpus: of the node.
            gpus: of the node, made up.
            inside: words that start the node's command inside of something, such as another mount namespace.
            environment: further variables of the node.
        """
        options = f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"
        return self._start(*options, inside=inside, environment=environment)

    def remove(self, node: Family) -> None:
        """The node leaves as one that is shut down: the head is told, and need not find out."""
        raylets = [number for number, command in node.commands().items() if "/raylet/raylet" in command.split(" ")[0]]
        for raylet in raylets:
            os.kill(raylet, signal.SIGTERM)
        wait_for(lambda: not set(raylets) & set(node.processes()), 30)
        node.kill()
        self._nodes.remove(node)

    def close(self) -> None:
        """Ends what is left of it."""
        for node in reversed(self._nodes):
            node.kill()

    def _start(self, *options: str, inside: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Family:
        node = Family({**self.environment, **(environment or {})})
        self._nodes.append(node)
        # Ray's default is one port for all, so that the agent of a second Ray on a machine takes no jobs.
        agent = f"--dashboard-agent-listen-port={_free_ports(1)[0]}"
        command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", *options, agent]
        how = ended(node.spawn(command, self._folder))
        if how.code:
            self.close()
            raise RuntimeError(f"a node did not start: {how}")
        return node


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on, each another one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@contextmanager
def ray_cluster(
    cpus: int = 1, gpus: int = 0, dashboard: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[RayCluster]:
    """A cluster for a while, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(Path(folder), cpus, gpus, dashboard, environment)
        try:
            yield cluster
        finally:
            cluster.close()
