"""How long the default study takes with an empty cache, what it finds, and whether that holds on other seeds."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BUDGET_S = 240
NO_DISTILLATION = "no_distillation"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs `hintsearch search` on the default study, each time in a new folder with an empty cache, and "
        f"compares its wall time with the budget of {BUDGET_S} s on 2 cores, its best search trial with its best "
        "control in the search and, as the search itself does, on fresh seeds, and the control without distillation "
        "with the range of 80 to 92 % that leaves something to win. Then retrains the winner and the control without "
        "distillation on the same fresh seeds, and compares their test accuracies."
    )
    parser.add_argument("--runs", type=int, default=3, help="searches, with seeds 0, 1, ... [default: 3]")
    parser.add_argument("--seeds", type=int, default=5, help="students retrained of each [default: 5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args()
    runs = [search_and_retrain(seed, arguments.seeds) for seed in range(arguments.runs)]
    figures = {
        "wall_seconds": statistics.median(run["wall_seconds"] for run in runs),
        "no_distillation": [run["no_distillation"] for run in runs],
        "runs": runs,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def search_and_retrain(seed: int, students: int) -> dict[str, Any]:
    """One search; its wall time includes the start of Python and Ray."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = time.perf_counter()
        found = hintsearch(folder, "search", "digits", "--set", f"seed={seed}")
        seconds = time.perf_counter() - started
        completed = [trial for trial in found["trials"] if trial["outcome"] == "completed"]
        tested = found["confirmation"]["comparison"]
        values = {
            arm: [t["metrics"]["val_accuracy"] for t in completed if t["arm"] == arm] for arm in ("search", "control")
        }
        plain = next(trial for trial in completed if trial["control"] == NO_DISTILLATION)
        hintsearch(folder, "export", "digits", "--trial", str(plain["number"]), "-o", "plain.yaml")
        return {
            "seed": seed,
            "wall_seconds": seconds,
            "no_distillation": plain["metrics"]["val_accuracy"],
            "best_control": max(values["control"]),
            "best_search": max(values["search"], default=float("nan")),
            "confirmed_lead": tested["mean"],
            "confirmed_interval": tested["interval"],
            "confirmed_verdict": tested["verdict"],
            "completed": len(completed),
            "trials": len(found["trials"]),
            "test_winner": retrained(folder, found["hints"], students),
            "test_no_distillation": retrained(folder, "plain.yaml", students),
        }


def retrained(folder: Path, hints: str, students: int) -> list[float]:
    """Test accuracies of students retrained from a hint file; the first has the seeds of the search."""
    answer = hintsearch(folder, "distill", hints, "--seeds", str(students))
    return [student["test_accuracy"] for student in answer["students"]]


def hintsearch(folder: Path, *arguments: str) -> Any:
    """The JSON document that a command answers."""
    environment = {**os.environ, "HINTSEARCH_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "hintsearch", *arguments, "--json"]
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    return json.loads(ended.stdout)


def show(figures: dict[str, Any]) -> None:
    """Prints one row a run."""
    table = Table(title=f"The default study on {figures['machine']}, {figures['date']}")
    columns = (
        "seed",
        "wall time",
        "no distillation",
        "best control",
        "best of search",
        "lead on fresh seeds",
        "completed",
    )
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("test: winner", justify="right")
    table.add_column("test: no distillation", justify="right")
    for run in figures["runs"]:
        table.add_row(
            str(run["seed"]),
            f"{run['wall_seconds']:.0f} s",
            *(f"{run[key]:.4f}" for key in ("no_distillation", "best_control", "best_search")),
            lead(run),
            f"{run['completed']} of {run['trials']}",
            spread(run["test_winner"]),
            spread(run["test_no_distillation"]),
        )
    Console(width=160).print(table)
    print(f"median wall time {figures['wall_seconds']:.0f} s, budget {BUDGET_S} s")


def lead(run: dict[str, Any]) -> str:
    """The search's best less its best control on fresh seeds, in points, with its 95 % interval."""
    interval = run["confirmed_interval"]
    around = f" ({100 * interval[0]:+.1f} .. {100 * interval[1]:+.1f})" if interval else ""
    return f"{100 * run['confirmed_lead']:+.1f}{around}"


def spread(values: list[float]) -> str:
    """Mean ± sd."""
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"


if __name__ == "__main__":
    main()
