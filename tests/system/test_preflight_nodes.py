"""What preflight finds on the other node of a real cluster; nothing is started or left behind."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from disturbances import HANGS_S, SMALL_STUDY
from processes import CommandLine, Ended, Family, ended, wait_for
from ray_cluster import RayCluster, ray_cluster

# Mounts an empty file system over a folder that others see, then becomes the rest of the words.
HIDDEN = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a study and a place for its results, where nothing is left behind."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_STUDY))
    (folder / "results").mkdir()
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Its head alone."""
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture
def blind(cluster: RayCluster, folder: Path) -> Iterator[None]:
    """A second node has another folder of results."""
    node = cluster.add(inside=[*HIDDEN, str(folder / "results")])
    yield
    cluster.remove(node)


@pytest.fixture
def of_another_version(cluster: RayCluster, tmp_path: Path) -> Iterator[None]:
    """A second node has hintsearch 9.9.9."""
    information = tmp_path / "hintsearch-9.9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hintsearch\nVersion: 9.9.9\n")
    node = cluster.add(environment={"PYTHONPATH": str(tmp_path)})
    yield
    cluster.remove(node)


@pytest.fixture(scope="module")
def second(cluster: RayCluster) -> Family:
    """A second node that nothing is wrong with, from the first test on that asks for it."""
    return cluster.add()


def refused(cluster: RayCluster, folder: Path, cache: Path, *words: str) -> Ended:
    command_line = CommandLine(cache, environment=cluster.environment)
    before = sorted(path.name for path in folder.rglob("*"))
    how = ended(command_line.start([*words, "small.yaml", "--address", cluster.address], folder), HANGS_S)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert len(how.err.strip().splitlines()) == 1, how.err
    assert how.code == 2
    return how


@pytest.mark.usefixtures("blind")
def test_trap_23_a_storage_that_a_node_does_not_see_is_found_before_anything_is_spent(
    cluster: RayCluster, folder: Path, cache: Path
) -> None:
    for command in ("check", "search"):
        how = refused(cluster, folder, cache, command)
        said = f"does not see storage.path {folder / 'results'} as this machine does; choose a folder that all"
        assert said in how.err


@pytest.mark.usefixtures("of_another_version")
def test_a_node_with_another_version_is_found(cluster: RayCluster, folder: Path, cache: Path) -> None:
    how = refused(cluster, folder, cache, "check")
    assert "has hintsearch 9.9.9, but this machine has " in how.err
    assert how.err.strip().endswith("install the same on all nodes")


@pytest.mark.usefixtures("second")
def test_a_good_cluster_passes_and_keeps_no_trace(cluster: RayCluster, folder: Path, cache: Path) -> None:
    command_line = CommandLine(cache, environment=cluster.environment)
    how = ended(command_line.start(["check", "small.yaml", "--address", cluster.address], folder), HANGS_S)
    assert how.code == 0, how.err
    assert list((folder / "results").iterdir()) == []


@pytest.mark.usefixtures("second")
def test_a_trial_that_fits_no_single_node_is_refused(cluster: RayCluster, folder: Path, cache: Path) -> None:
    how = refused(cluster, folder, cache, "check", "--set", "resources={cpus_per_trial: 2}")
    assert "a trial asks for 2 CPUs and 0 GPUs of one node, but the nodes have 1 CPUs and 0 GPUs" in how.err


def test_a_node_that_does_not_answer_is_named(cluster: RayCluster, second: Family, folder: Path, cache: Path) -> None:
    """The last test of that cluster: its second node stays frozen."""
    command_line = CommandLine(cache, environment=cluster.environment)
    answering = second.processes()
    process = command_line.start(["check", "small.yaml", "--address", cluster.address], folder)
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
