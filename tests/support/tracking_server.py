"""A real MLflow server that dies and comes back."""

import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from mlflow.tracking import MlflowClient
from processes import Family, wait_for


class TrackingServer:
    """`mlflow server` on a free port of 127.0.0.1; it keeps its port and its store when it is started again.

    Args:
        folder: of the artifacts.
        allowed_hosts: names that it answers to; None: its own, with and without its port (trap 15).
        store: address of the database; None: sqlite in the folder.
    """

    def __init__(self, folder: Path, allowed_hosts: str | None = None, store: str | None = None) -> None:
        self._folder, self._allowed_hosts = folder, allowed_hosts
        self._store = store or f"sqlite:///{folder / 'server.db'}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.uri = f"http://{self.address}"
        self._family = Family({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"})

    @property
    def client(self) -> MlflowClient:
        """On its store, whether it lives or not."""
        return MlflowClient(self._store)

    def start(self) -> None:
        """Returns as soon as it answers.

        Raises:
            TimeoutError: it does not.
        """
        host, port = self.address.split(":")
        options = {
            "backend-store-uri": self._store,
            "artifacts-destination": str(self._folder / "artifacts"),
            "host": host,
            "port": port,
            # One process answers a search of one driver as well as the default four, and starts sooner.
            "workers": "1",
            "allowed-hosts": self._allowed_hosts or f"{host},{self.address}",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._family.serve([sys.executable, "-m", "mlflow", "server", *words], self._folder)
        if not wait_for(self._answers, 90):
            raise TimeoutError(f"the MLflow server at {self.uri} does not answer")

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        self._family.kill()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False
