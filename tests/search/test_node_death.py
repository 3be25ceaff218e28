import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "node_death.py"


def test_lost_node_changes_no_bit_of_the_layers_though_nothing_takes_its_place() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    assert len(found["lost_at"]) == 1
    assert found["cpus"] == 1
    assert found["equal"] is True
