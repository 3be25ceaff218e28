"""The command line as a process, and a tiny study for it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

# Set by a command that starts Ray for this machine alone.
RAY_OF_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TINY_STUDY = {
    "name": "tiny",
    "seed": 3,
    "data": {"name": "digits", "train_fraction": 0.3},
    "teacher": {
        "model": "resnet8",
        "width": 0.5,
        "recipe": {"epochs": 8, "lr": 0.1, "batch_size": 32, "crop_padding": 1, "flip": False},
    },
    "student": {"model": "resnet8", "width": 0.25},
    "layers": {"chunk": 100},
    "space": {
        "hints": {"clusters": {"low": 1, "high": 3}},
        "weight": {"hint": {"low": 0.01, "high": 1}, "logit": {"low": 0.1, "high": 1, "optional": True}},
    },
    "recipe": {"lr": 0.1, "batch_size": 32, "crop_padding": 1, "flip": False},
    "controls": {"arms": ["no_distillation", "reversed"], "trials": 2},
    "confirm": {"seeds": 0},
    "budget": {"trials": 3, "rungs": [3, 6], "reduction": 1.5, "checkpoint_seconds": 0},
    "resources": {"concurrent_trials": 1},
}


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    code: int
    out: str
    err: str

    def document(self) -> dict:
        """The one JSON document on stdout."""
        return json.loads(self.out)


class Family:
    """Starts processes, and knows every living one that descends from them, also those that outlive their parent.

    Args:
        environment: further variables.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        # Ray's own processes inherit it.
        self.mark = f"hintsearch-test-{uuid.uuid4()}"
        unset = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH", RAY_OF_SEVERAL_MACHINES)
        inherited = {key: value for key, value in os.environ.items() if key not in unset}
        self.environment = {**inherited, "HINTSEARCH_TEST_MARK": self.mark, **(environment or {})}

    def spawn(self, command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
        """Starts a process in a group of its own: a background process would ignore Ctrl-C (trap 36)."""
        return subprocess.Popen(
            command,
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def serve(self, command: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
        """Starts one that outlives who reads it: what it says is in `server.log`, for a full pipe would stop it."""
        with (folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self, but: Sequence[str] = ()) -> list[int]:
        """Living processes of the family; `but`: names that do not count."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    named = (entry / "cmdline").read_text().startswith(tuple(but)) if but else False
                    found += [int(entry.name)] if state != "Z" and not named else []
            except OSError:
                continue
        return found

    def commands(self) -> dict[int, str]:
        """Command lines of its living processes."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(OSError):
                found[process] = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
        return found

    def listens_on(self) -> set[str]:
        """The addresses, as in /proc/net, on which its living processes take connections from elsewhere."""
        sockets = {}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A":
                    sockets[f"socket:[{inode}]"] = local.partition(":")[0]
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                links = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()}
                found |= {sockets[link] for link in links & set(sockets)}
        return found

    def names(self) -> set[str]:
        """First words of the command lines of its living processes."""
        return {command.split(" ")[0] for command in self.commands().values()}

    def kill(self) -> None:
        """SIGKILL to all of it, also to what is started meanwhile."""
        while living := self.processes():
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def wait_until_gone(self, seconds: float = 30, but: Sequence[str] = ()) -> list[int]:
        """What is still alive after waiting."""
        wait_for(lambda: not self.processes(but), seconds)
        return self.processes(but)


class CommandLine(Family):
    """Runs hintsearch as a process.

    Args:
        cache: folder of the cache.
        console_script: whether by `hintsearch` instead of `python -m hintsearch`.
        environment: further variables.
    """

    def __init__(self, cache: Path, console_script: bool = False, environment: Mapping[str, str] | None = None) -> None:
        super().__init__({"HINTSEARCH_CACHE": str(cache), **(environment or {})})
        script = Path(sys.executable).with_name("hintsearch")
        self.command = [str(script)] if console_script else [sys.executable, "-m", "hintsearch"]

    def start(self, arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
        """Starts it."""
        return self.spawn([*self.command, *arguments], folder)

    def run(self, arguments: Sequence[str], folder: Path, timeout: float = 120) -> Ended:
        """Runs it to its end."""
        return ended(self.start(arguments, folder), timeout)


def ended(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
    """How a process ends."""
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def call(arguments: Sequence[str], folder: Path, cache: Path) -> Ended:
    """Runs the command line in this process: the same answers without the seconds that a start takes."""
    from hintsearch.search.command_line import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["hintsearch", *arguments])
        patch.setenv("HINTSEARCH_CACHE", str(cache))
        # What a command sets here does not outlive it.
        patch.setenv(RAY_OF_SEVERAL_MACHINES, "0")
        for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        with pytest.raises(SystemExit) as left:
            main()
    return Ended(int(left.value.code or 0), out.getvalue(), err.getvalue())


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.1) -> bool:
    """Whether the condition came true in time; looked at `every` so many seconds."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return met


def journal_events(folder: Path, kind: str | None = None) -> list[dict]:
    """Whole lines of a search's journal, of one kind if it is named."""
    path = folder / "journal.jsonl"
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    events = [json.loads(line) for line in whole.splitlines()]
    return [event for event in events if kind in (None, event["event"])]


def users_project(folder: Path, study: str) -> Path:
    """Makes a user's project that has packages and modules of our folders' names."""
    for package in ("models", "search", "distill"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise RuntimeError('the user module was imported')\n")
    (folder / "analysis.py").write_text("raise RuntimeError('the user module was imported')\n")
    (folder / "tiny.yaml").write_text(study)
    return folder


def experiment_id(client: MlflowClient) -> str:
    """Of the tiny study's experiment."""
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return str(experiment.experiment_id)
