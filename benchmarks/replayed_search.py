"""A search whose trials train nothing: they report the curves of another search at once.

`search_overhead.py` and `throughput.py` run it.

All but the trainable is the product's: `run_search` with its journal, Tune experiment, sampler, scheduler and MLflow.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from hintsearch.models.zoo import build_model
from hintsearch.search import runner
from hintsearch.search.epoch_reports import EpochReports
from hintsearch.search.events import History
from hintsearch.search.journal import read_journal
from hintsearch.search.study import load_study
from hintsearch.search.trial import CHECKPOINT_FILE, TrialContext
from hintsearch.search.view import View
from ray import tune

Reports = Sequence[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("journal", type=Path, help="of the search whose curves are reported")
    parser.add_argument("--trials", type=int, default=500, help="controls included [default: 500]")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at once [default: 2]")
    parser.add_argument("--cores", type=int, help="that Ray pretends to have [default: as many as there are]")
    parser.add_argument("--each", action="store_true", help="report each epoch by itself")
    parser.add_argument("--name", default="replayed", help="of this search [default: replayed]")
    parser.add_argument("--seconds", type=Path, metavar="FILE", help="write there what the sampler took, as JSON")
    options = parser.parse_args()
    searched = options.trials - load_study("digits").control_trials
    keys = {
        "budget.trials": searched,
        "confirm.seeds": 0,
        "resources.concurrent_trials": options.concurrent,
    }
    study = load_study("digits", [f"{key}={value}" for key, value in keys.items()])
    sampling = Stopwatch(runner.ArmSampler.suggest)
    # The only changes to the product, and the second one changes nothing but that it is timed.
    vars(runner)["run_trial"] = replaying(curves_of(options.journal), options.each)
    runner.ArmSampler.suggest = lambda *arguments: sampling(*arguments)  # type: ignore[method-assign]
    if options.cores:
        # A search takes a Ray that is there.
        ray.init(num_cpus=options.cores, include_dashboard=False)
    runner.run_search(study, name=options.name, view=View(True))
    if options.seconds:
        options.seconds.write_text(json.dumps(sampling.seconds))


class Stopwatch:
    """Calls a function, and remembers what each call took.

    Args:
        function: to call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        """Passes everything on."""
        started = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds.append(time.perf_counter() - started)


def curves_of(journal: Path) -> list[Reports]:
    """The reports of all trials that came to their end."""
    history = History()
    for event in read_journal(journal).events:
        history.apply(event)
    completed = [t for t in history.trials.values() if t.finished and t.finished.outcome == "completed"]
    return [[trial.reports[epoch].metrics for epoch in sorted(trial.reports)] for trial in completed]


def replaying(curves: Sequence[Reports], each: bool) -> Callable[[dict[str, Any], TrialContext], None]:
    """A trainable in the place of `run_trial`."""

    def run_trial(config: dict[str, Any], context: TrialContext) -> None:
        torch.set_num_threads(context.threads)
        reports = EpochReports()
        # A checkpoint has each weight and its momentum; torch would write the very same tensors once only.
        student = [build_model(context.student).state_dict() for _ in ("weights", "momentum")]
        curve = curves[config["number"] % len(curves)]
        for epoch, metrics in enumerate(curve, start=1):
            reports.add({"epoch": epoch, "epoch_seconds": 0.0, **metrics})
            if epoch == len(curve) or (each and epoch not in context.rungs):
                reports.send()
            elif epoch in context.rungs:
                # As a trial does at the end of a rung.
                with TemporaryDirectory() as folder:
                    torch.save(student, Path(folder) / CHECKPOINT_FILE)
                    reports.send(checkpoint=tune.Checkpoint.from_directory(folder))

    return run_trial


if __name__ == "__main__":
    main()
