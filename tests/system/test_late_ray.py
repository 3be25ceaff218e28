"""Ray that does not come up, in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Family, wait_for

STARTS = """
from hintsearch.models.errors import InputError
from hintsearch.search.ray_session import ray_session

try:
    with ray_session(None):
        print("it has started")
except InputError as error:
    print(error)
"""


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family()
    yield family
    family.kill()


def frozen_start(family: Family, folder: Path) -> str:
    """What is said where Ray's own process stands still as soon as it is there; empty if that came too late."""
    process = family.spawn([sys.executable, "-c", STARTS], folder)

    def raylets() -> list[int]:
        return [number for number, command in family.commands().items() if "/raylet/raylet" in command.split(" ")[0]]

    assert wait_for(lambda: bool(raylets()), 60, every=0.001)
    for raylet in raylets():
        os.kill(raylet, signal.SIGSTOP)
    try:
        out, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        out = ""
    family.kill()
    return out


def test_ray_that_has_not_started_in_time_is_one_line(family: Family, tmp_path: Path) -> None:
    said = next(filter(None, (frozen_start(family, tmp_path) for _ in range(3))), "")
    assert said.splitlines()[-1:] == [
        "Ray has not started within its 30 s, for other work keeps this machine busy; try again, or give --address"
    ]
