import os
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, threading
from hintsearch.distill.allocation import keep_freed_memory
{call}
faults = []

def work():
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [b"x" * (24 * 2**20) for _ in range(4)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

{run}
print(sum(faults[-5:]))
"""
HEAPS = """
import ctypes, threading
from hintsearch.distill.allocation import keep_freed_memory
{call}
start = threading.Barrier(3)
work = lambda: (start.wait(), b"x" * 2**20)
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
ctypes.CDLL(None).malloc_stats()
"""
IN_A_THREAD = "thread = threading.Thread(target=work); thread.start(); thread.join()"
CALL = "keep_freed_memory()"
# glibc then gives everything back at once; left to itself it does so or not, as its heap happens to lie.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def result(script: str, **filled: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", script.format(**filled)]
    return subprocess.run(program, env={**os.environ, **RETURNING}, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("run", ["work()", IN_A_THREAD])
def test_freed_memory_is_used_again(run: str) -> None:
    kept, returned = (int(result(PAGE_FAULTS, call=call, run=run).stdout) for call in (CALL, ""))
    assert kept < 1_000 < returned


def test_threads_share_one_heap() -> None:
    shared, own = (result(HEAPS, call=call).stderr.count("Arena") for call in (CALL, ""))
    assert (shared, own) == (1, 4)
