"""A Ray cluster of two nodes on this machine, each a family of processes of its own."""

import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from processes import Family, wait_for


class TwoNodes:
    """A head and a second node with one CPU each, by `ray start`.

    Args:
        folder: short, for Ray keeps its sockets there.
        inside: words that start the second node's command inside of something, such as another mount namespace.
        environment: further variables of the second node.
    """

    def __init__(self, folder: Path, inside: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # What a driver needs to join.
        self.environment = {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.address = f"127.0.0.1:{port}"
        self.head = Family(self.environment)
        self.second = Family({**self.environment, **(environment or {})})
        self._folder = folder
        self._start(self.head, [], "--head", f"--port={port}", "--include-dashboard=false")
        self._start(self.second, inside, f"--address={self.address}")

    def close(self) -> None:
        """Ends what is left of it."""
        self.second.kill()
        self.head.kill()

    def _start(self, node: Family, inside: Sequence[str], *options: str) -> None:
        command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *options]
        process = node.spawn(command, self._folder)
        # A node is there with its raylet; `--block` then says nothing more.
        if not wait_for(lambda: any("/raylet/raylet" in name for name in node.names()), 90):
            self.close()
            raise TimeoutError(f"a node did not start: {process.communicate()}")
