"""What preflight finds on the other node of a real cluster of two; nothing is started or left behind."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from disturbances import HANGS_S, SMALL_STUDY
from processes import CommandLine, Ended, ended, wait_for
from two_nodes import TwoNodes

# Mounts an empty file system over a folder that others see, then becomes the rest of the words.
HIDDEN = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"']


@contextmanager
def two_nodes(**options: Any) -> Iterator[TwoNodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = TwoNodes(Path(folder), **options)
        try:
            yield nodes
        finally:
            nodes.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a study and a place for its results, where nothing is left behind."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_STUDY))
    (folder / "results").mkdir()
    return folder


@pytest.fixture(scope="module")
def good() -> Iterator[TwoNodes]:
    """A cluster that nothing is wrong with."""
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def blind(folder: Path) -> Iterator[TwoNodes]:
    """A cluster whose second node has another folder of results."""
    with two_nodes(inside=[*HIDDEN, str(folder / "results")]) as nodes:
        yield nodes


def refused(nodes: TwoNodes, folder: Path, cache: Path, *words: str) -> Ended:
    command_line = CommandLine(cache, environment=nodes.environment)
    before = sorted(path.name for path in folder.rglob("*"))
    how = ended(command_line.start([*words, "small.yaml", "--address", nodes.address], folder), HANGS_S)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert len(how.err.strip().splitlines()) == 1, how.err
    assert how.code == 2
    return how


@pytest.mark.parametrize("command", ["check", "search"])
def test_trap_23_a_storage_that_a_node_does_not_see_is_found_before_anything_is_spent(
    command: str, blind: TwoNodes, folder: Path, cache: Path
) -> None:
    how = refused(blind, folder, cache, command)
    assert f"does not see storage.path {folder / 'results'} as this machine does; choose a folder that all" in how.err


def test_a_node_with_another_version_is_found(
    folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shim = tmp_path_factory.mktemp("shim")
    (shim / "hintsearch-9.9.9.dist-info").mkdir()
    (shim / "hintsearch-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hintsearch\nVersion: 9.9.9\n"
    )
    with two_nodes(environment={"PYTHONPATH": str(shim)}) as nodes:
        how = refused(nodes, folder, cache, "check")
    assert "has hintsearch 9.9.9, but this machine has " in how.err
    assert how.err.strip().endswith("install the same on all nodes")


def test_a_good_cluster_passes_and_keeps_no_trace(good: TwoNodes, folder: Path, cache: Path) -> None:
    command_line = CommandLine(cache, environment=good.environment)
    how = ended(command_line.start(["check", "small.yaml", "--address", good.address], folder), HANGS_S)
    assert how.code == 0, how.err
    assert list((folder / "results").iterdir()) == []


def test_a_trial_that_fits_no_single_node_is_refused(good: TwoNodes, folder: Path, cache: Path) -> None:
    how = refused(good, folder, cache, "check", "--set", "resources={cpus_per_trial: 2}")
    assert "a trial asks for 2 CPUs and 0 GPUs of one node, but the nodes have 1 CPUs and 0 GPUs" in how.err


def test_a_node_that_does_not_answer_is_named(good: TwoNodes, folder: Path, cache: Path) -> None:
    """The last test of that cluster: its second node stays frozen."""
    command_line = CommandLine(cache, environment=good.environment)
    answering = good.second.processes()
    process = command_line.start(["check", "small.yaml", "--address", good.address], folder)
    # The marker tells that the nodes are asked now.
    assert wait_for(lambda: any((folder / "results").iterdir()), HANGS_S, every=0.001)
    for frozen in answering:
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGSTOP)
    how = ended(process, HANGS_S)
    assert how.code == 2
    (line,) = how.err.strip().splitlines()
    assert line.endswith(" has not answered for 18 s; look at it by `ray status`, or take it out of the cluster")
    assert list((folder / "results").iterdir()) == []
