"""One undisturbed search for all tests, in whatever process of pytest they run."""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbances import HANGS_S, DisturbedSearch, Undisturbed
from processes import Ended, wait_for
from ray_cluster import RayCluster, ray_cluster

# One that waits, while the others wait for the teacher; then the longest: begun last, each would be waited for alone.
FIRST = (
    "test_late_ray",
    "test_dead_tracking_server",
    "test_stopped_driver",
    "test_trial_workers",
    "test_killed_driver",
    "test_full_disk",
    "test_ray_jobs",
    "test_made_up_gpus",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; the order inside a file stays."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def running_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[DisturbedSearch, Path]:
    """The undisturbed search, started by the first process of pytest that asks, and the file of its exit code."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reference"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        search = DisturbedSearch(shared, shared / "cache", "undisturbed")
        if not (shared / "started").exists():
            words = [*search.command_line.command, *search.arguments()]
            # Its output in files: who reads it need not be who started it.
            line = '"$@" > out 2> err; echo $? > ending && mv ending ended'
            subprocess.Popen(
                ["sh", "-c", line, "sh", *words],
                cwd=shared,
                env=search.command_line.environment,
                start_new_session=True,
            )
            (shared / "started").touch()
    return search, shared / "ended"


@pytest.fixture(scope="session")
def cache(running_reference: tuple[DisturbedSearch, Path]) -> Path:
    """A cache with the teacher and its layers."""
    search, over = running_reference
    assert wait_for(lambda: bool(search.events("prepared")) or over.exists(), HANGS_S)
    return search.folder / "cache"


@pytest.fixture(scope="session")
def undisturbed(running_reference: tuple[DisturbedSearch, Path]) -> Undisturbed:
    """The undisturbed search at its end."""
    search, over = running_reference
    assert wait_for(over.exists, HANGS_S)
    how = Ended(int(over.read_text()), (search.folder / "out").read_text(), (search.folder / "err").read_text())
    assert how.code == 0, how.err
    assert len(json.loads(how.out)["trials"]) > 0
    return Undisturbed(search.results, search.events(), how)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A Ray of one node that searches come to and leave."""
    with ray_cluster(cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def new_search(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., DisturbedSearch]]:
    """Makes a search of a name, in a folder of its own unless one is given, that need not train the teacher."""
    made = []

    def make(name: str, folder: Path | None = None, **options: Any) -> DisturbedSearch:
        made.append(DisturbedSearch(folder or tmp_path_factory.mktemp(name), cache, name, **options))
        return made[-1]

    yield make
    # What a test that failed in the middle has left.
    for search in made:
        search.command_line.kill()
