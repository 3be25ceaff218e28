"""How often Python collects, in a command and once its work begins."""

import json
import subprocess
import sys

CODE = """
import gc, json
before = gc.get_threshold()
from hintsearch.search.collector import collect_rarely, keep_what_there_is
collect_rarely()
importing = gc.get_threshold()
keep_what_there_is()
print(json.dumps([before, importing, gc.get_threshold(), gc.get_freeze_count()]))
"""


def test_collections_are_rare_while_importing_and_as_usual_afterwards() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, importing, afterwards, kept = json.loads(ended.stdout)
    assert importing[0] > 100 * before[0]
    assert afterwards == before
    assert kept > 1000
