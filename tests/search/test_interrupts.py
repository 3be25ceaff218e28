"""When an interrupt takes effect, and how long it may take, in processes that hang in every way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ignores the signal as Tune's own handler does, or hangs in what follows it.
HANGS = """
import signal, sys, time
from hintsearch.search.interrupts import InterruptDeadline

seen = []
signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))


def finish():
    print("finished", flush=True)
    {finish}


deadline = InterruptDeadline({seconds}, 3, lambda: print("go on with --resume", flush=True))
deadline.finish = finish
with deadline:
    print("ready", flush=True)
    {body}
print("left", flush=True)
"""
FOREVER = "while True: time.sleep(0.05)"
# Not signal.pause(): the signal may come before it, and no second one does.
UNTIL_SIGNAL = "while not seen: time.sleep(0.05)"


def run(number: signal.Signals, body: str, seconds: float, finish: str = "pass") -> tuple[int, list[str]]:
    """Exit code and lines of such a process that gets a signal when it is ready."""
    code = HANGS.format(seconds=seconds, body=body, finish=finish)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip()]
    assert lines == ["ready"]
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, lines + rest.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_process_that_hangs_after_a_signal_ends_with_the_code_and_says_how_to_go_on(number: signal.Signals) -> None:
    code, lines = run(number, FOREVER, seconds=0.2)
    assert (code, lines) == (3, ["ready", "finished", "go on with --resume"])


def test_process_that_cannot_finish_says_how_to_go_on_all_the_same() -> None:
    code, lines = run(signal.SIGINT, FOREVER, seconds=0.2, finish="raise OSError('the store is gone')")
    assert code == 3
    assert lines[-1] == "go on with --resume"


def test_process_that_ends_in_time_is_left_alone() -> None:
    # What is left after the signal takes less than the limit.
    code, lines = run(signal.SIGINT, UNTIL_SIGNAL, seconds=60)
    assert (code, lines) == (0, ["ready", "left"])


def test_other_signals_set_no_limit() -> None:
    body = "signal.signal(signal.SIGUSR1, lambda *_: None); print('set', flush=True); time.sleep(1)"
    code = HANGS.format(seconds=0.1, body=body, finish="pass")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "set":
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.splitlines()) == (0, ["left"])


SAVES = """
import signal, time
from hintsearch.search.interrupts import interrupt_after_imports, interrupts_ignored

signal.signal(signal.SIGINT, interrupt_after_imports)
try:
    with interrupts_ignored():
        print("ready", flush=True)
        input()
        print("saved", flush=True)
    print("again", flush=True)
    while True: time.sleep(0.05)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_interrupts_change_nothing_of_what_is_saved_and_are_heard_again_after_it() -> None:
    command = [sys.executable, "-c", SAVES]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
    process.stdin.write("\n")
    process.stdin.flush()
    assert [process.stdout.readline().strip() for _ in range(2)] == ["saved", "again"]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.splitlines()) == (0, ["interrupted"])


# A library that swallows what is raised while it is imported.
SLOW = """
import time
try:
    print("ready", flush=True)
    time.sleep(1)
    print("imported", flush=True)
except BaseException as error:
    print("swallowed", error, flush=True)
"""
IMPORTS = """
import signal, sys, time
from hintsearch.search.interrupts import interrupt_after_imports

signal.signal(signal.SIGINT, interrupt_after_imports)
try:
    {body}
    while True: time.sleep(0.05)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [("import slow", ["imported", "interrupted"]), ("print('ready', flush=True)", ["interrupted"])],
)
def test_interrupt_waits_for_the_end_of_an_import(body: str, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS.format(body=body)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    # In the middle of the second that the import takes: the module itself has said so.
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.splitlines()) == (0, said)
