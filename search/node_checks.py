"""What is checked on every node of a cluster before anything is spent: storage, data, code, versions, resources."""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..distill.data import DataSplits
from ..distill.lazy_images import LazyImages
from ..distill.splits import Split
from ..models.errors import InputError, reason
from ..models.own_code import own_code_sha256
from .ray_session import is_here_alone, living_nodes
from .study import Study

# For all questions to all nodes; a node starts a process and imports packages before it answers its first.
ANSWER_SECONDS = 18.0
SAME_PACKAGES = ("hintsearch", "ray", "torch", "numpy")
CODE_FOLDERS = ("models", "distill", "analysis", "search")
# An edited checkout has the version of the one it was made from.
OWN_FILES = "files of hintsearch"

Facts = dict[str, Any]


def check_nodes(study: Study, splits: Callable[[], DataSplits]) -> None:
    """Checks every node of the cluster that this process has joined; leaves nothing behind.

    Of the driver's own machine alone there is nothing to ask: it has been checked.

    Args:
        study: what is to be searched.
        splits: gives its images; where they are decoded while they are read, every node has to find them.

    Raises:
        InputError: names the node, what is wrong with it, and the mend.
    """
    living = living_nodes()
    check_one_trial_fits(study, [node["Resources"] for node in living])
    if study.resources.workers > 1:
        _check_dashboard()
    if is_here_alone(living):
        return
    nodes = {node["NodeID"]: _name(node) for node in living}
    storage, deadline = Path(study.storage.path), time.monotonic() + ANSWER_SECONDS
    mine = code_facts()
    with _marker(storage) as (marker, content):
        answers = _ask(nodes, deadline, _look, str(storage), marker.name, content)
    for node, facts in answers.items():
        check_facts(nodes[node], facts, mine, storage)
    _check_what_is_read(study, splits().train, nodes, deadline)


def _check_dashboard() -> None:
    """Raises `InputError` unless Ray tells of its actors.

    By that Ray Train notices that a trial was stopped, and gives the CPUs and GPUs of its workers back.
    """
    from ray.util.state import list_actors

    try:
        list_actors(limit=1, timeout=int(ANSWER_SECONDS))
    except Exception as error:
        # Of Ray's own kind, of the network's, or a bare one, by what fails.
        raise InputError(
            f"Ray's dashboard does not tell of actors ({reason(error)}), without which the workers of a stopped trial "
            "would hold their GPUs; start Ray's head without --include-dashboard=false"
        ) from error


def check_one_trial_fits(study: Study, nodes: list[Mapping[str, float]]) -> None:
    """Raises `InputError` unless one of the nodes has what a trial asks for; of several workers, each what it asks for.

    A cluster that grows for trials that wait may have no such node yet: there the study says how many run at once.

    Args:
        study: its resources are used.
        nodes: resources of each node, by Ray's names.
    """
    if study.resources.concurrent_trials or _one_trial_fits(study, nodes):
        return
    wanted, workers = _wanted(study), study.resources.workers
    asks = "a trial asks for" if workers == 1 else f"each of the {workers} workers of a trial asks for"
    most = ", ".join(f"{float(node.get('CPU', 0)):g} CPUs and {float(node.get('GPU', 0)):g} GPUs" for node in nodes)
    raise InputError(
        f"{asks} {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs of one node, but the nodes have {most}; "
        "lower resources.cpus_per_trial or gpus_per_trial, or, if the cluster grows, set resources.concurrent_trials"
    )


def waiting_note(study: Study) -> str | None:
    """That trials will wait for the cluster to grow; None if one of its nodes has what a trial asks for."""
    if _one_trial_fits(study, [node["Resources"] for node in living_nodes()]):
        return None
    wanted, workers = _wanted(study), study.resources.workers
    if workers > 1:
        return (
            f"The nodes do not have {workers} times {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs at present: "
            "trials wait until the cluster has grown."
        )
    return (
        f"No node has {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs at present: trials wait until the cluster has "
        "grown by one that has."
    )


def _wanted(study: Study) -> dict[str, float]:
    return {"CPU": float(study.resources.cpus_per_worker), "GPU": float(study.resources.gpus_per_worker)}


def _one_trial_fits(study: Study, nodes: list[Mapping[str, float]]) -> bool:
    wanted = {kind: amount for kind, amount in _wanted(study).items() if amount}
    places = (min(int(float(node.get(kind, 0)) / amount) for kind, amount in wanted.items()) for node in nodes)
    return sum(places) >= study.resources.workers


def check_facts(node: str, facts: Facts, mine: Mapping[str, str], storage: Path) -> None:
    """Raises `InputError` for the first thing that is wrong with a node.

    Args:
        node: its name.
        facts: what it found.
        mine: versions and code of this process.
        storage: where results lie.
    """
    if not facts["sees"]:
        raise InputError(
            f"the node {node} does not see storage.path {storage} as this machine does; choose a folder that all nodes "
            "share, such as one on NFS"
        )
    if facts["write_error"]:
        raise InputError(
            f"the node {node} cannot write to storage.path {storage} ({facts['write_error']}); give it the right "
            "to, or choose another folder"
        )
    for name, ours in mine.items():
        theirs = facts["code"].get(name)
        if theirs != ours:
            told = f"{name} {theirs}, but this machine has {ours}" if theirs else f"no {name}"
            told = f"other {name} than this machine" if name == OWN_FILES else told
            raise InputError(f"the node {node} has {told}; install the same on all nodes")


def code_facts() -> dict[str, str]:
    """Versions of Python and of the packages that trials compute with, and a hash of hintsearch's own files."""
    found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in SAME_PACKAGES:
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = ""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        try:
            spec = find_spec(f"hintsearch.{folder}")
        except ImportError:
            continue
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(place).glob("*.py")):
                digest.update(file.name.encode() + file.read_bytes())
    found[OWN_FILES] = digest.hexdigest()
    return found


@contextmanager
def _marker(storage: Path) -> Iterator[tuple[Path, str]]:
    """A file in the storage with content that nobody else knows; it goes again, and folders made for it."""
    made = [place for place in (storage, *storage.parents) if not place.exists()]
    marker, content = storage / f".hintsearch-{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        storage.mkdir(parents=True, exist_ok=True)
        marker.write_text(content)
        yield marker, content
    finally:
        marker.unlink(missing_ok=True)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def _look(storage: str, marker: str, content: str) -> Facts:
    """What a node finds; runs there."""
    file, own = Path(storage, marker), Path(storage, f"{marker}-{uuid.uuid4().hex}")
    try:
        sees, error = file.read_text() == content, ""
    except OSError:
        sees, error = False, ""
    if sees:
        try:
            own.write_text(content)
            own.unlink()
        except OSError as caught:
            error = str(caught.strerror or caught)
    return {"sees": sees, "write_error": error, "code": code_facts()}


def _check_what_is_read(study: Study, train: Split, nodes: Mapping[str, str], deadline: float) -> None:
    """Own code and images that workers read themselves."""
    own = {name: own_code_sha256(name) for name in study.own_code().values()}
    first = train.subset(np.arange(1)) if isinstance(train, LazyImages) else None
    if not own and first is None:
        return
    for node, found in _ask(nodes, deadline, _read, list(own), first).items():
        for name, sha256 in own.items():
            if found["own"][name] != sha256:
                what = "has no" if found["own"][name] is None else "has another"
                raise InputError(f"the node {nodes[node]} {what} {name}; put the very file where all nodes see it")
        if found["error"]:
            raise InputError(
                f"the node {nodes[node]} cannot read the images ({found['error']}); put them where all nodes see them"
            )


def _read(own: list[str], first: Split | None) -> Facts:
    """What a node finds of the user's own code and of the first image; runs there."""
    error = ""
    if first is not None:
        try:
            first.read(np.arange(1))
        except Exception as caught:
            # Readers of images raise what they like; whatever it is, this node cannot read.
            error = reason(caught)
    return {"own": {name: own_code_sha256(name) for name in own}, "error": error}


def _ask(nodes: Mapping[str, str], deadline: float, question: Any, *arguments: Any) -> dict[str, Facts]:
    """What each node answers; all at once, until the monotonic clock comes to the deadline.

    Raises:
        InputError: a node that does not answer, or cannot.
    """
    # By value: a node with another hintsearch, or none, has to be able to say so.
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        remote: Any = ray.remote(question)
        asked = {
            remote.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(*arguments): node
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=max(0.0, deadline - time.monotonic()))
    if silent:
        raise InputError(
            f"the node {nodes[asked[silent[0]]]} has not answered for {ANSWER_SECONDS:g} s; look at it by `ray "
            "status`, or take it out of the cluster"
        )
    found: dict[str, Facts] = {}
    for reference in answered:
        node = asked[reference]
        try:
            found[node] = ray.get(reference)
        except Exception as error:
            # Unpickling on another version raises anything; the last line of Ray's text is the cause.
            cause = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(
                f"the node {nodes[node]} cannot run hintsearch ({cause[0].strip()}); install the same on all nodes"
            ) from error
    return found


def _name(node: Mapping[str, Any]) -> str:
    """Host name and address; of several nodes of a machine also the start of Ray's own id."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def joins_a_cluster(address: str | None) -> bool:
    """Whether a command with this address runs on a cluster that is there already."""
    return bool(address or os.environ.get("RAY_ADDRESS"))
