"""Records the learning curves that `search_logic.py` replays, by training a few hundred random configurations.

    nice python benchmarks/record_curves.py [--trials N] [--control-seeds N] [--folder FOLDER] [-o FILE]

One `hintsearch search` of the digits study, of which every suggestion is random and ASHA stops next to nothing: at a
reduction of just above 1 only a trial that is worse at the end of the first rung than all before it, which is left out.
Its parameters and figures are read from its journal. Then the seven control arms, with the study's defaults, are
trained again with other seeds. Interrupted, the same command with the same folder goes on.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.trainer import Seeds, Trainer
from hintsearch.search.events import History, TrialHistory
from hintsearch.search.journal import read_journal
from hintsearch.search.preparation import Preparation, prepare
from hintsearch.search.specs import student_spec
from hintsearch.search.study import Study, load_study, validate_study
from hintsearch.search.view import View
from recorded_curves import DIGITS, RecordedTrial, Recording, write_recording

STUDY, NAME = "digits", "record"
METRICS = ("val_accuracy", "val_loss", "train_loss")
JUST_ABOVE_ONE = 1 + 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=480, help="random configurations [default: 480]")
    parser.add_argument("--control-seeds", type=int, default=5, help="runs of each control arm [default: 5]")
    parser.add_argument(
        "--folder", type=Path, default=Path("recording"), help="where the search and its cache lie [default: recording]"
    )
    parser.add_argument("--output", "-o", type=Path, default=DIGITS, help=f"[default: {DIGITS}]")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["HINTSEARCH_CACHE"] = str(options.folder.resolve() / "cache")
    search(options.folder, options.trials)
    history = replayed(options.folder / "results" / NAME / "journal.jsonl")
    recording = recorded(history, options.control_seeds)
    write_recording(options.output, recording)
    print(f"{len(recording.trials)} curves in {options.output}, {options.output.stat().st_size / 1e3:.0f} kB")


def search(folder: Path, trials: int) -> None:
    """Runs the search, or what is left of it."""
    begun = (folder / "results" / NAME / "journal.jsonl").exists()
    keys = {
        "budget.trials": trials,
        "budget.startup_trials": trials,
        "budget.reduction": JUST_ABOVE_ONE,
        "confirm.seeds": 0,
    }
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "hintsearch", "search", STUDY, *settings, "--name", NAME]
    subprocess.run([*command, *(["--resume"] if begun else [])], cwd=folder, check=True)


def replayed(journal: Path) -> History:
    """What a search knew at its end."""
    history = History()
    for event in read_journal(journal).events:
        history.apply(event)
    return history


def recorded(history: History, control_seeds: int) -> Recording:
    """The whole of the search's trials, and the controls with further seeds."""
    assert history.began is not None
    assert history.prepared is not None
    study = validate_study(history.began.study, NAME)
    preparation = prepare(study, View())
    whole = [trial for trial in history.trials.values() if trial.finished and trial.finished.outcome != "pruned"]
    controls = first_of_each_arm(history)
    execution = Execution("cpu", history.prepared.precision)
    trials = [as_recorded(trial) for trial in whole if trial.suggested.arm == "search" or trial in controls]
    for trial in controls:
        trials += [retrained(trial, seed, study, preparation, execution) for seed in range(1, control_seeds)]
    return Recording(
        without_places(load_study(STUDY).resolved()),
        preparation.layers.candidates,
        preparation.student,
        LayerDistances(
            preparation.layers.distances.paths,
            preparation.layers.distances.distances,
            preparation.layers.distances.scores,
            preparation.layers.distances.images,
        ),
        tuple(trials),
        f"{os.cpu_count()} cores, {platform.machine()}, {date.today().isoformat()}",
    )


def without_places(study: dict[str, Any]) -> dict[str, Any]:
    """The study without the paths of this machine."""
    return {key: value for key, value in study.items() if key not in ("storage", "tracking")}


def first_of_each_arm(history: History) -> list[TrialHistory]:
    """The controls with the study's defaults; later ones of an arm have random weights."""
    first: dict[str, TrialHistory] = {}
    for _, trial in sorted(history.trials.items()):
        if trial.suggested.arm == "control":
            first.setdefault(trial.suggested.control, trial)
    return list(first.values())


def as_recorded(trial: TrialHistory) -> RecordedTrial:
    """A trial of the search."""
    assert trial.finished is not None
    reports = [trial.reports[epoch].metrics for epoch in sorted(trial.reports)]
    return one_recorded(trial, trial.suggested.init_seed, reports, trial.finished.error)


def retrained(
    trial: TrialHistory, seed: int, study: Study, preparation: Preparation, execution: Execution
) -> RecordedTrial:
    """A trial's configuration with another seed, trained as `run_trial` does it."""
    torch.set_num_threads(study.resources.cpus_per_trial)
    hints = HintConfiguration.from_dict(trial.suggested.hints)
    trainer = Trainer(
        student_spec(study, preparation.splits),
        preparation.splits,
        replace(study.recipe.recipe(), lr=trial.suggested.parameters["lr"]),
        study.budget.rungs,
        Seeds(seed, seed),
        hints=hints,
        teacher=preparation.teacher.trained().as_teacher() if hints.needs_teacher else None,
        execution=execution,
    )
    reports, failure = [], ""
    try:
        reports += [result.metrics for result in trainer.epochs()]
    except NonFiniteLossError as error:
        failure = str(error)
    return one_recorded(trial, seed, reports, failure)


def one_recorded(trial: TrialHistory, seed: int, reports: Sequence[Mapping[str, float]], failure: str) -> RecordedTrial:
    """What is kept of one training, in as many digits as anything depends on."""
    suggested = trial.suggested
    curves = {name: tuple(round(metrics[name], 5) for metrics in reports) for name in METRICS} if reports else {}
    points = tuple(suggested.selection["indices"]) if suggested.selection else ()
    return RecordedTrial(suggested.arm, suggested.control, seed, suggested.parameters, points, curves, failure)


if __name__ == "__main__":
    main()
