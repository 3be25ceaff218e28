"""How often Python collects, in a command and once its work begins."""

import json
import subprocess
import sys

CODE = """
import gc, json
before = gc.get_threshold()
from hintsearch.search.collector import collect_as_usual, collect_rarely, keep_what_there_is
collect_rarely()
importing = gc.get_threshold()
collect_as_usual()
working = gc.get_threshold()
collect_rarely()
keep_what_there_is()
print(json.dumps([before, importing, working, gc.get_threshold(), gc.get_freeze_count()]))
"""


def test_collections_are_rare_while_importing_and_as_usual_afterwards() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, importing, working, afterwards, kept = json.loads(ended.stdout)
    assert importing[0] > 100 * before[0]
    assert working == afterwards == before
    assert kept > 1000
