"""A tracking server that does not know the host name it is called by."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from disturbances import HANGS_S, SMALL_STUDY
from processes import CommandLine, ended
from tracking_server import TrackingServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"), allowed_hosts="mlflow.example.org")
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize("command", ["check", "search"])
def test_trap_15_a_server_that_refuses_is_found_before_anything_is_spent(
    command: str, server: TrackingServer, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_STUDY))
    command_line = CommandLine(tmp_path / "cache")
    how = ended(command_line.start([command, "small.yaml", "--tracking", server.uri], tmp_path), HANGS_S)
    assert how.code == 2
    assert how.err.strip().splitlines() == [
        f"error: the tracking store {server.uri} answers, but refuses (403): sign in by MLFLOW_TRACKING_USERNAME and "
        f"MLFLOW_TRACKING_PASSWORD, or start it with --allowed-hosts that have 127.0.0.1 and {server.address}"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]
