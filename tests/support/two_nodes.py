"""A Ray cluster of two nodes on this machine, each a family of processes of its own."""

import secrets
import socket
import sys
from pathlib import Path

from processes import Family, wait_for


class TwoNodes:
    """A head and a second node with one CPU each, by `ray start`.

    Args:
        folder: short, for Ray keeps its sockets there.
    """

    def __init__(self, folder: Path) -> None:
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
        self.head, self.second = Family(self.environment), Family(self.environment)
        self._folder = folder
        self._start(self.head, "--head", f"--port={port}", "--include-dashboard=false")
        self._start(self.second, f"--address={self.address}")

    def close(self) -> None:
        """Ends what is left of it."""
        self.second.kill()
        self.head.kill()

    def _start(self, node: Family, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *options]
        process = node.spawn(command, self._folder)
        # A node is there with its raylet; `--block` then says nothing more.
        if not wait_for(lambda: any("/raylet/raylet" in name for name in node.names()), 90):
            self.close()
            raise TimeoutError(f"a node did not start: {process.communicate()}")
