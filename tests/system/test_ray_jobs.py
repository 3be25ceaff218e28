"""A search as Ray jobs: submitted from a user's folder, stopped, and ended from a checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from disturbances import CONTROLS, HANGS_S, SMALL_STUDY, Event
from mlflow.tracking import MlflowClient
from processes import Ended, Family, ended, journal_events, users_project, wait_for
from ray_cluster import RayCluster, ray_cluster
from search_records import missing_epochs, records, records_by_journal, repeated_events, statuses

ROOT = Path(__file__).parents[2]
# Enough trials that some are left after both stops: Ray's command takes seconds to start.
TRIALS = 14
NUMBERS = list(range(1, CONTROLS + TRIALS + 1))
# What a job gets between `ray job stop` and SIGKILL, as the files in deploy/ set it; Ray's default is 3 s.
PATIENT = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}']


class Jobs:
    """Ray's own command line for jobs, on a cluster.

    Args:
        cluster: where jobs run.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._family = Family(cluster.environment)
        self._address = ["--address", cluster.address]

    def call(self, command: str, *words: str, folder: Path = ROOT) -> Ended:
        """`ray job COMMAND`."""
        line = [sys.executable, "-m", "ray.scripts.scripts", "job", command, *self._address, *words]
        return ended(self._family.spawn(line, folder), HANGS_S)

    def submit(self, job: str, folder: Path, arguments: Sequence[str], *options: str) -> Ended:
        """Submits hintsearch with a copy of a folder."""
        given = ["--submission-id", job, "--working-dir", ".", *options, "--", "hintsearch", *arguments]
        return self.call("submit", *given, folder=folder)


@dataclass(frozen=True)
class Submitted:
    """A search that went through three jobs.

    Attributes:
        tracking: its store.
        stopped: what `ray job stop` said of the first one, which Ray kills after 3 s.
        killed: the journal after that.
        interrupted: log of the second one, which was stopped with a minute's time.
        last: what submitting the third one said, until its end.
        events: the whole journal.
    """

    tracking: str
    stopped: Ended
    killed: list[Event]
    interrupted: Ended
    last: Ended
    events: list[Event]


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[RayCluster]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with ray_cluster(cpus=2, dashboard=True, environment={"HINTSEARCH_CACHE": str(cache), "PATH": path}) as cluster:
        # Right after its start Ray says "No available agent to submit job, please try again later".
        assert wait_for(lambda: Jobs(cluster).call("submit", "--", "true").code == 0, HANGS_S)
        yield cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository, in another place."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def submitted(cluster: RayCluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    storage = tmp_path_factory.mktemp("storage")
    study = yaml.safe_dump(
        {**SMALL_STUDY, "budget": {**SMALL_STUDY["budget"], "trials": TRIALS}, "storage": {"path": str(storage)}},
        sort_keys=False,
    )
    # With packages of our folders' names (trap 30), as a checkout has them, too.
    user = users_project(tmp_path_factory.mktemp("user"), study)
    shutil.copy(user / "tiny.yaml", checkout)
    tracking = f"sqlite:///{storage / 'mlflow.db'}"
    words = ["search", "tiny.yaml", "--name", "job", "--address", "auto", "--tracking", tracking]
    jobs, results = Jobs(cluster), storage / "job"

    def reports(more_than: int) -> bool:
        return len(journal_events(results, "report")) > more_than

    submitted = jobs.submit("first", user, words, "--no-wait")
    assert submitted.code == 0, submitted
    assert wait_for(lambda: reports(3), HANGS_S), jobs.call("logs", "first").out
    stopped = jobs.call("stop", "first")
    killed = journal_events(results)
    assert jobs.submit("second", user, [*words, "--resume"], "--no-wait", *PATIENT).code == 0
    assert wait_for(lambda: reports(len(killed)), HANGS_S), jobs.call("logs", "second").out
    jobs.call("stop", "second")
    interrupted = jobs.call("logs", "second")
    last = jobs.submit("third", checkout, [*words, "--resume"])
    return Submitted(tracking, stopped, killed, interrupted, last, journal_events(results))


def test_trap_30_a_job_searches_from_a_folder_with_models_search_and_analysis(submitted: Submitted) -> None:
    assert sum(event["event"] == "report" for event in submitted.killed) > 3


def test_ray_job_stop_ends_the_search(submitted: Submitted) -> None:
    assert "stopped" in submitted.stopped.out, submitted.stopped
    assert not any(event["event"] == "outcome" and event["number"] == NUMBERS[-1] for event in submitted.killed)


def test_a_job_that_is_given_time_says_how_to_go_on(submitted: Submitted) -> None:
    said = submitted.interrupted.out
    assert "Interrupted; everything so far is saved." in said
    assert "--name job" in said
    assert "--resume" in said


def test_a_job_from_a_checkout_sees_the_search_to_its_end(submitted: Submitted) -> None:
    assert submitted.last.code == 0, submitted.last
    assert "Job 'third' succeeded" in submitted.last.out


def test_nothing_is_lost_and_nothing_is_done_twice(submitted: Submitted) -> None:
    events = submitted.events
    assert events[: len(submitted.killed)] == submitted.killed
    assert sorted(event["number"] for event in events if event["event"] == "suggestion") == NUMBERS
    assert sorted(event["number"] for event in events if event["event"] == "outcome") == NUMBERS
    assert repeated_events(events) == []
    assert missing_epochs(events) == {}


def test_trap_14_each_trial_has_one_run_and_each_metric_once(submitted: Submitted) -> None:
    client = MlflowClient(submitted.tracking)
    assert records(client, "tiny", "job") == records_by_journal(submitted.events)
    assert statuses(client, "tiny") == {"FINISHED": len(NUMBERS) + 1}
