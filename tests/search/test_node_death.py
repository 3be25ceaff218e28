import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "node_death.py"


def test_lost_node_changes_no_bit_of_the_layers_though_nothing_takes_its_place() -> None:
    # A folder of its own: Ray notes there which cluster a later `ray.init` joins. Short, for it holds sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder}
        command = [sys.executable, str(SCRIPT)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    assert len(found["lost_at"]) == 1
    assert found["cpus"] == 1
    assert found["equal"] is True
