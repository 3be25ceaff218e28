"""How much the parts of a search take in: reports, journal lines, requests to the tracking store.

    python benchmarks/throughput.py [--json FILE] [--tracking URI] [--seconds S] [--trials N] [--actors N ...]

1. Journal: reports of one epoch with a study's metrics, each line fsynced, on the disk of the folder it is called in.
2. Tracking store: the same epochs by the search's own writer, one a request and ten a request, from one search and from
   eight at once. A sqlite file, `mlflow server` on another one, and each --tracking (for example a server on
   PostgreSQL: `--tracking http://127.0.0.1:5000`; runs are left in its experiment "throughput").
3. Driver: a search of the digits study whose trials train nothing and report recorded curves at once
   (`replayed_search.py`), each epoch by itself, and once more the epochs of a rung together, which tells reports from
   trials; with more and more actors on a Ray that pretends to have as many cores. What the actors need comes from the
   same cores, so reports a second are a lower bound.

The keys of the JSON file: journal_reports_per_s, stores (store, writers, epochs_per_request, requests_per_s,
epochs_per_s, trial_s), driver (actors, reports_per_s, report_cpu_s, trial_cpu_s, start_s).
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from hintsearch.search.events import Reported, Suggested
from hintsearch.search.journal import SearchLog
from hintsearch.search.tracking import EpochMetrics, TrackedSearch, connect
from rich.console import Console
from rich.table import Table
from search_overhead import EVERY, journal_of, replay

# A study with some layer metrics logs as many figures an epoch.
FIGURES = {f"metric_{number}": 0.5 for number in range(10)}
SEARCHES = 8
SERVER = "mlflow server on sqlite"
BATCHES = (1, 10)
TRIALS = 5


@dataclass(frozen=True)
class Stored:
    """What a tracking store takes in.

    Attributes:
        store: its address, or what it is.
        writers: searches that log at once.
        epochs_per_request: how many epochs each request has.
        requests_per_s: of all writers together.
        trial_s: seconds that one writer takes for what a trial has beside its epochs, while the others write, too.
    """

    store: str
    writers: int
    epochs_per_request: int
    requests_per_s: float
    trial_s: float

    @property
    def epochs_per_s(self) -> float:
        """Of all writers together."""
        return self.requests_per_s * self.epochs_per_request


@dataclass(frozen=True)
class Driven:
    """What the driver takes in.

    Attributes:
        actors: that report as fast as they can.
        reports_per_s: of one epoch each, that came in.
        report_cpu_s: the driver's processor time for a message of Tune's, however many epochs it has.
        trial_cpu_s: for all else of a trial: its start, its end, what is journaled and logged of its epochs.
        start_s: of an actor, from the end of one trial to the end of the next one that trains nothing.
    """

    actors: int
    reports_per_s: float
    report_cpu_s: float
    trial_cpu_s: float
    start_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--tracking", action="append", default=[], metavar="URI", help="also measure this store")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each store is written to [default: 5]")
    parser.add_argument("--trials", type=int, default=300, help="of each search [default: 300]")
    parser.add_argument("--actors", type=int, nargs="+", default=[2, 8], help="trials at once [default: 2 8]")
    options = parser.parse_args()
    if options.trials < 2 * EVERY:
        parser.error(f"--trials is {options.trials}, but rates are taken between two samples; give {2 * EVERY} or more")
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place).resolve()
        os.environ |= {"HINTSEARCH_CACHE": str(folder / "cache"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        journal = journal_reports(folder, options.seconds)
        with tracking_server(folder) as server:
            places = {f"sqlite:///{folder / 'file.db'}": "sqlite file", server: SERVER}
            places |= {uri: uri for uri in options.tracking}
            stores = [
                stored(uri, name, writers, epochs, options.seconds)
                for uri, name in places.items()
                for writers in (1, SEARCHES)
                for epochs in BATCHES
            ]
        curves = recorded(folder)
        driven = [driver(folder, curves, options.trials, actors) for actors in options.actors]
    figures = {
        "journal_reports_per_s": journal,
        "stores": [{**asdict(one), "epochs_per_s": one.epochs_per_s} for one in stores],
        "driver": [asdict(one) for one in driven],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    show(journal, stores, driven, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def journal_reports(folder: Path, seconds: float) -> float:
    """Journal lines of an epoch each, a second."""
    log = SearchLog(folder / "journal.jsonl")
    log.record(Suggested(1, "search", "", {}, {}, {}, {}))
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done += 1
        log.record(Reported(1, done, FIGURES, None))
    return done / (time.perf_counter() - began)


def stored(uri: str, name: str, writers: int, epochs: int, seconds: float) -> Stored:
    """What some searches at once log to a store."""
    client = connect(uri, create=True)
    search = f"throughput-{time.time():.3f}"
    searches = [TrackedSearch(client, "throughput", f"{search}-{writer}", None) for writer in range(writers)]
    runs = [tracked.create_trial(1, {}) for tracked in searches]
    end = time.perf_counter() + seconds

    def log(tracked: TrackedSearch, run: str) -> int:
        requests = 0
        while time.perf_counter() < end:
            first, now = requests * epochs, round(time.time() * 1000)
            tracked.log_epochs(run, [EpochMetrics(first + epoch, FIGURES, now) for epoch in range(epochs)])
            requests += 1
        return requests

    began = time.perf_counter()
    with ThreadPoolExecutor(writers) as threads:
        requests = sum(threads.map(log, searches, runs))
    rate = requests / (time.perf_counter() - began)
    with ThreadPoolExecutor(writers) as threads:
        took = list(threads.map(one_trial, searches))
    for tracked, run in zip(searches, runs, strict=True):
        for each in (run, tracked.parent_run_id):
            tracked.close(each, "FINISHED", {})
    found = Stored(name, writers, epochs, rate, statistics.mean(took))
    print(f"{name}, {writers} writers, {epochs} epochs a request: {found.requests_per_s:.0f} a second", file=sys.stderr)
    return found


def one_trial(tracked: TrackedSearch) -> float:
    """What a trial logs beside its epochs, in seconds: the mean of a few."""
    began = time.perf_counter()
    for number in range(2, 2 + TRIALS):
        run = tracked.create_trial(number, dict.fromkeys(FIGURES, "tag"))
        tracked.log_params(run, FIGURES)
        tracked.log_document(run, "hint_configuration.json", FIGURES)
        tracked.close(run, "FINISHED", {"outcome": "completed"})
    return (time.perf_counter() - began) / TRIALS


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """`mlflow server` with its default number of processes on a sqlite file; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    # A group of its own: its workers end with it.
    process = subprocess.Popen(
        command, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_until_up(address: str) -> None:
    """Returns as soon as a server answers.

    Raises:
        SystemExit: it does not within two minutes.
    """
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server at {address} does not answer")


def recorded(folder: Path) -> Path:
    """The journal of a small search of the digits study."""
    command = [sys.executable, "-m", "hintsearch", "search", "digits", "--name", "recorded"]
    command += ["--set", "budget.trials=4", "--set", "confirm.seeds=0"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return journal_of(folder, "recorded")


def driver(folder: Path, curves: Path, trials: int, actors: int) -> Driven:
    """Two searches whose actors do nothing but report: their epochs one by one, and those of a rung together."""
    one_by_one, together = (
        replay(folder, name, curves, trials, actors, "--cores", str(actors), *more)[0]
        for name, more in ((f"each-{actors}", ["--each"]), (f"rungs-{actors}", []))
    )
    more_reports = one_by_one["reports_per_trial"] - together["messages_per_trial"]
    cpu = "driver_cpu_seconds_per_trial"
    report = (one_by_one[cpu] - together[cpu]) / more_reports
    return Driven(
        actors,
        one_by_one["reports_per_trial"] / one_by_one["seconds_per_trial"],
        report,
        together[cpu] - together["messages_per_trial"] * report,
        together["seconds_per_trial"] * actors,
    )


def show(journal: float, stores: Sequence[Stored], driven: Sequence[Driven], figures: dict[str, Any]) -> None:
    """Prints a table for each part."""
    print(f"journal: {journal:.0f} reports of one epoch a second, each on disk")
    table = Table(title=f"Tracking store, epochs of {len(FIGURES)} figures")
    for column in ("store", "searches", "epochs a request", "requests/s", "epochs/s", "a trial, s"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for one in stores:
        rates = (f"{one.requests_per_s:.0f}", f"{one.epochs_per_s:.0f}", f"{one.trial_s:.3f}")
        table.add_row(one.store, str(one.writers), str(one.epochs_per_request), *rates)
    Console(width=140).print(table)
    table = Table(title="Driver, reports of one epoch each")
    headings = ("actors", "reports/s", "its processor time, ms a report", "ms a trial", "start of a trial, s")
    for column in headings:
        table.add_column(column, justify="right")
    for driven_by in driven:
        milliseconds = (f"{1e3 * cpu:.1f}" for cpu in (driven_by.report_cpu_s, driven_by.trial_cpu_s))
        table.add_row(
            str(driven_by.actors), f"{driven_by.reports_per_s:.1f}", *milliseconds, f"{driven_by.start_s:.2f}"
        )
    Console(width=140).print(table)
    print(f"{figures['machine']}, {figures['date']}")


if __name__ == "__main__":
    main()
