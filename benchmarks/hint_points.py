"""Whether it matters which layers of the teacher give the hints: CIFAR-100, resnet32 → resnet8, 10 epochs.

    python benchmarks/hint_points.py --data ROOT --json FILE [--seeds N]

10,000 training images. The teacher is trained once on the same images and cached. What is compared, each with the same
seeds, recipe and two annealed schedules of 4 and 6 epochs:

- Controls: no_distillation (labels alone), kd_only, and KD + FitNet with the hint points stage_ends, evenly_spaced,
  random (new layers for every seed), reversed, last.
- KD + FitNet with hint points chosen from the layers: kmeans_r2_cca, kmeans_cka (PURSUhInT's k-means), kmedoids
  (r2_cca).
- searched: the winner of a search of 16 trials with ASHA over hint points, losses and weights, trained anew.
- hkd: kmeans_r2_cca with HKD's weights for each image. indistill: kmeans_r2_cca after InDistill's warm-up, which takes
  the place of the first 4 epochs.

All but `searched` take the study's defaults: 3 hint points (the student's stages), weights 1 of labels, KD (τ = 4) and
each normalised hint term. Only `searched` was tuned. HKD's weight network learns on 1,000 further images, which no arm
trains on. Trials of the search are decided by 5,000 validation images; the accuracies told here are of the 10,000 test
images, which each student sees once, after its last epoch. The seeds decide initial weights, order and augmentation.

Every finished run is appended at once to FILE's neighbour `.runs.jsonl`, and the search keeps a journal in the
neighbour `.work`: the same command goes on after an interruption. A table (.md) and a figure (.png) lie beside the
JSON file, too. Its keys:

- arms: of each arm `accuracy` by seed, `mean`, `sd` (per cent), `half_interval` of the mean, `pairs` by seed (teacher
  layer, student layer), `over_best_control`: mean paired difference in points with its 95 % t-interval `low`..`high`
  and `finding`: better, worse, null, or unknown of a single seed; `same_as`: by seed the arms above it with the very
  same configuration, trained once for all of them; `failed`: by seed why there is no accuracy.
- best_control: the control of the largest mean. finding: what is found, in words.
- seeds: `data_seed` and `init_seed` of each. teacher: `accuracy` on the test images. search: what was tried and won.
- setting, machine, date, command; seconds: `this_command`, and `runs`, summed over the processes that train.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

import numpy as np
import torch
from hint_points_report import figures_of, write_report
from hint_points_setting import ARMS, KD_ONLY, NO_DISTILLATION, SEARCHED, Amount, Arm, lay_out, splits_of, study_of
from hintsearch.analysis.trials import read_search
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.opening import open_batches
from hintsearch.distill.seeding import derived_seed
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, Trainer
from hintsearch.models.candidates import stage_ends
from hintsearch.models.errors import InputError
from hintsearch.models.weights import save_weights
from hintsearch.search.export import load_hints
from hintsearch.search.networks import TrainedNetwork
from hintsearch.search.preparation import Preparation, prepare, study_data
from hintsearch.search.runner import HINTS_FILE, resume_search, run_search
from hintsearch.search.sampler import default_parameters
from hintsearch.search.specs import student_spec, teacher_spec
from hintsearch.search.study import Study
from hintsearch.search.tracking import connect
from hintsearch.search.trial import HintResolver
from hintsearch.search.view import View

SEARCH = "hint-points"
# Students that learn from one stream of images and teacher outputs.
LARGEST_GROUP = 4
# Validation images that are looked at after each epoch; they decide nothing here.
WATCHED = 500


@dataclass(frozen=True)
class Run:
    """One student of one arm.

    Attributes:
        arm: its name.
        seed: 1, 2, ...
        configuration: what it learns by.
        rungs: epochs at which its annealed schedules end.
    """

    arm: str
    seed: int
    configuration: HintConfiguration
    rungs: tuple[int, ...]

    @property
    def data_seed(self) -> int:
        """Of order and augmentation, the same for all arms."""
        return derived_seed("hint_points data", self.seed)

    @property
    def init_seed(self) -> int:
        """Of initial weights, the same for all arms."""
        return derived_seed("hint_points init", self.seed)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        study: its data, recipe and student.
        folder: of the images.
        teacher: the trained network.
        precision: of the arithmetic.
        sha256: of all that decides results; runs of another setting are not mixed in.
    """

    study: Study
    folder: Path
    teacher: TrainedNetwork
    precision: str
    sha256: str


def main() -> None:
    options = parsed_options()
    try:
        compare(options)
    except InputError as error:
        raise SystemExit(str(error)) from error


def compare(options: argparse.Namespace) -> None:
    """Everything from the images to the report; what is done already is not done again."""
    started = time.perf_counter()
    view = View()
    keep_freed_memory()
    torch.set_num_threads(1)
    work = options.json.with_suffix(".work").resolve()
    folder = work / "data"
    lay_out(options.data, folder)
    study = study_of(folder, work, Amount(options.images, options.teacher_epochs, options.trials))
    train_teacher(study, options.threads)
    preparation = prepare(study, view)
    setting = setting_of(study, folder, preparation)
    record = Record(options.json.with_suffix(".runs.jsonl"), setting)
    fixed = list(planned(study, preparation, None, options.seeds))
    if not options.report:
        # The others take long; should there be no time for them, the table has at least what is simplest to compare.
        quick = [run for run in fixed if run.configuration.dynamic_weights is None]
        train_all(record, setting, quick, options.workers, options.threads)
        search(study, work, view)
    searched = found_configuration(work)
    runs = list(planned(study, preparation, searched, options.seeds))
    if not options.report:
        train_all(record, setting, runs, options.workers, options.threads)
    figures = figures_of(ARMS, record.results(runs)) | {
        "seeds": [
            {"seed": run.seed, "data_seed": run.data_seed, "init_seed": run.init_seed}
            for run in runs
            if run.arm == KD_ONLY
        ],
        "teacher": teacher_figures(setting, preparation),
        "search": search_figures(study, searched),
        "setting": setting_figures(setting, options),
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/hint_points.py --data ROOT --json {options.json.name} --seeds {options.seeds}",
        "seconds": {"this_command": time.perf_counter() - started, "runs": record.seconds(runs)},
    }
    write_report(options.json, figures)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Amount()
    parser.add_argument(
        "--data",
        type=Path,
        metavar="ROOT",
        required=True,
        help="where CIFAR-100 lies as train.npz and test.npz (or in ROOT/cifar100), or as torchvision has it",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("hint_points.json"), help="figures (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="paired seeds (default 3)")
    parser.add_argument("--images", type=int, default=usual.images, help="training images (default %(default)s)")
    parser.add_argument(
        "--teacher-epochs", type=int, default=usual.teacher_epochs, help="of the teacher (default %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=usual.trials, help="of the search (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="groups of students trained at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1)")
    parser.add_argument("--report", action="store_true", help="train no more arms; tell what is finished")
    return parser.parse_args()


def train_teacher(study: Study, threads: int) -> None:
    """Trains the teacher, once; goes on from its last epoch where it was interrupted."""
    assert study.teacher.checkpoint
    path = Path(study.teacher.checkpoint)
    if path.is_file():
        return
    torch.set_num_threads(threads)
    splits = study_data(study)
    recipe, epochs = study.teacher.recipe, study.teacher.recipe.epochs
    trainer = Trainer(
        teacher_spec(study, splits),
        replace(splits, validation=splits.validation.subset(np.arange(WATCHED))),
        recipe.recipe(),
        (epochs,),
        Seeds(study.seed, study.seed),
        execution=Execution("cpu", best_precision("cpu")[0]),
    )
    unfinished = path.with_suffix(".pt")
    if unfinished.is_file():
        trainer.load_checkpoint(unfinished)
    for result in trainer.epochs():
        trainer.save_checkpoint(unfinished)
        print(f"teacher: epoch {result.epoch} of {epochs}, loss {result.metrics['train_loss']:.3f}", flush=True)
    save_weights(path, trainer.student.state_dict())


def setting_of(study: Study, folder: Path, preparation: Preparation) -> Setting:
    precision, why = best_precision("cpu")
    print(f"Students are trained in {precision} ({why}).", flush=True)
    content = study.resolved()
    decides = {key: content[key] for key in ("seed", "student", "recipe", "budget", "space")}
    decides |= {"data": preparation.splits.sha256(), "teacher": preparation.teacher.sha256, "precision": precision}
    sha256 = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Setting(study, folder, preparation.teacher.trained(), precision, sha256)


def search(study: Study, work: Path, view: View) -> None:
    """Runs the search; one that was interrupted goes on."""
    if (work / SEARCH / HINTS_FILE).is_file():
        return
    begun = (work / SEARCH).exists()
    found = resume_search(SEARCH, work, view=view) if begun else run_search(study, name=SEARCH, view=view)
    if found.record:
        view.leaderboard(found.record)
    if found.interrupted or found.hints is None:
        raise InputError("the search was interrupted; the same command goes on with it")


def found_configuration(work: Path) -> HintConfiguration | None:
    """What the winner of the search learns by; None: the search has not ended."""
    hints = work / SEARCH / HINTS_FILE
    return load_hints(hints).hints.configuration() if hints.is_file() else None


def planned(study: Study, preparation: Preparation, searched: HintConfiguration | None, seeds: int) -> Iterator[Run]:
    """All runs, seed by seed; without those of the search's winner as long as there is none."""
    for seed in range(1, seeds + 1):
        for arm in ARMS:
            found = searched if arm.name == SEARCHED else fixed_configuration(study, preparation, arm, seed)
            if found is not None:
                yield Run(arm.name, seed, found, arm.rungs)


def fixed_configuration(study: Study, preparation: Preparation, arm: Arm, seed: int) -> HintConfiguration:
    """An arm by the study's defaults, as the search itself would resolve it; random layers are new for every seed."""
    layers = preparation.layers
    parameters = default_parameters(study.space, study.recipe.lr)
    if arm.name == NO_DISTILLATION:
        parameters |= {"weight.logit": 0.0}
    if arm.selector:
        parameters |= {
            "hints.selector": arm.selector,
            "hints.clusters": len(stage_ends(preparation.student)),
            "hints.metrics": ",".join(arm.metrics),
        }
    resolver = HintResolver(layers.candidates, preparation.student, layers.distances, study.seed)
    configuration, _ = resolver.resolve(seed, arm.selector if arm.is_control else "", parameters)
    return replace(configuration, warmup=arm.warmup, dynamic_weights=arm.weights)


class Record:
    """The finished runs, one JSON line each.

    Args:
        path: of the file.
        setting: of the runs.

    Raises:
        InputError: the file holds runs of another setting, or a damaged line.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path, self._setting = path, setting
        self._lines: dict[tuple[str, int, str], dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # Killed while it was written: that run is trained again.
            os.truncate(path, len(whole))
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise InputError(f"line {number} of {path} is damaged ({error}); remove that line") from error
            if line["setting"] != setting.sha256:
                raise InputError(f"{path} holds runs of another setting; give another --json, or remove that file")
            self._lines[line["arm"], line["seed"], line["configuration"]] = line

    def add(self, run: Run, result: Mapping[str, Any]) -> None:
        """Appends a finished run; it is on the disk when this returns."""
        pairs = [[pair.teacher_layer, pair.student_layer] for pair in run.configuration.pairs]
        line = {"setting": self._setting.sha256, "arm": run.arm, "seed": run.seed, "pairs": pairs, **result}
        line["configuration"] = hash_of(run)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines[run.arm, run.seed, hash_of(run)] = line

    def of(self, run: Run) -> dict[str, Any] | None:
        """What came of a run; None: it is yet to be trained."""
        return self._lines.get((run.arm, run.seed, hash_of(run)))

    def results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """What came of the runs."""
        return [line for run in runs if (line := self.of(run))]

    def seconds(self, runs: Sequence[Run]) -> float:
        """What the runs took, of one worker."""
        return float(sum(line["seconds"] for line in self.results(runs)))


def hash_of(run: Run) -> str:
    content = json.dumps([run.configuration.to_dict(), run.rungs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def train_all(record: Record, setting: Setting, runs: Sequence[Run], workers: int, threads: int) -> None:
    """Trains what is missing; arms that come to the same configuration for a seed are trained once."""
    missing = [run for run in runs if record.of(run) is None]
    groups = list(grouped(missing))
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done; the others in {len(groups)} groups.", flush=True)
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        waiting = {pool.submit(train, setting, [same[0] for same in group], threads): group for group in groups}
        for number, future in enumerate(as_completed(waiting), start=1):
            for same, result in zip(waiting[future], future.result(), strict=True):
                for run in same:
                    record.add(run, result)
                print(f"seed {same[0].seed}, {', '.join(run.arm for run in same)}: {line_of(result)}", flush=True)
            spent = (time.perf_counter() - started) / 60
            left = spent / number * (len(groups) - number)
            print(f"  {number} of {len(groups)} groups, {spent:.1f} min; about {left:.0f} min left", flush=True)


def start_worker() -> None:
    """Makes a worker end with the command, even where that was killed: nobody would take what it trains."""
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def grouped(runs: Sequence[Run]) -> Iterator[list[list[Run]]]:
    """Runs that are trained together: of one seed and schedule. Those with dynamic weights take long, and come last."""
    long: list[list[list[Run]]] = []
    for seed in sorted({run.seed for run in runs}):
        same: dict[str, list[Run]] = {}
        for run in runs:
            if run.seed == seed:
                same.setdefault(hash_of(run), []).append(run)
        together: list[list[Run]] = []
        for own in same.values():
            if own[0].configuration.dynamic_weights:
                long.append([own])
            elif own[0].configuration.warmup:
                yield [own]
            else:
                together.append(own)
        for first in range(0, len(together), LARGEST_GROUP):
            yield together[first : first + LARGEST_GROUP]
    yield from long


def line_of(result: Mapping[str, Any]) -> str:
    return str(result["failed"]) if result["failed"] else f"{100 * result['accuracy']:.2f} %"


def train(setting: Setting, runs: Sequence[Run], threads: int) -> list[dict[str, Any]]:
    """Trains the students of a group and tests each once, after its last epoch."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    splits = splits_of(setting.study, setting.folder)
    spec = student_spec(setting.study, splits)
    execution = Execution("cpu", setting.precision)
    try:
        trainer = GroupTrainer(
            spec,
            replace(splits.without_test(), validation=splits.validation.subset(np.arange(WATCHED))),
            setting.study.recipe.recipe(),
            runs[0].rungs,
            [TaughtStudent(run.configuration, run.init_seed) for run in runs],
            runs[0].data_seed,
            teacher=setting.teacher.as_teacher(),
            execution=execution,
        )
        *_, last = trainer.epochs()
    except NonFiniteLossError as error:
        if len(runs) > 1:
            return [result for run in runs for result in train(setting, [run], threads)]
        return [{"failed": str(error), "accuracy": None, "seconds": time.perf_counter() - started}]
    assert splits.test is not None
    test = open_batches(splits.test, splits.preprocessing, execution.place)
    found = [evaluate(network, test, 256, execution) for network in trainer.networks]
    seconds = (time.perf_counter() - started) / len(runs)
    return [
        {**tested, "train_loss": epoch.metrics["train_loss"], "failed": None, "seconds": seconds}
        for tested, epoch in zip(found, last, strict=True)
    ]


def teacher_figures(setting: Setting, preparation: Preparation) -> dict[str, Any]:
    splits = splits_of(setting.study, setting.folder)
    assert splits.test is not None
    execution = Execution("cpu", setting.precision)
    test = open_batches(splits.test, splits.preprocessing, execution.place)
    teacher = preparation.teacher
    return {
        "model": teacher.spec.name,
        "epochs": setting.study.teacher.recipe.epochs,
        "accuracy": 100 * evaluate(teacher.network(), test, 256, execution)["accuracy"],
        "val_accuracy": 100 * teacher.val_accuracy,
        "sha256": teacher.sha256,
    }


def search_figures(study: Study, winner: HintConfiguration | None) -> dict[str, Any] | None:
    """What the search tried, and its winner."""
    if winner is None:
        return None
    assert study.tracking.uri
    record = read_search(connect(study.tracking.uri, create=False), SEARCH)
    best = record.winner()
    assert best is not None
    return {
        "trials": [
            {"trial": t.number, "outcome": t.outcome, "epochs": t.epochs, record.metric: t.metrics.get(record.metric)}
            for t in sorted(record.trials, key=lambda trial: trial.number)
        ],
        "winner": {
            "trial": best.number,
            record.metric: best.metrics[record.metric],
            "parameters": best.parameters,
            "configuration": winner.to_dict(),
        },
    }


def setting_figures(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    study = setting.study
    return {
        "training_images": options.images,
        "student": study.student.model,
        "recipe": asdict(study.recipe.recipe()),
        "rungs": list(study.budget.rungs),
        "trials": options.trials,
        "precision": setting.precision,
        "workers": options.workers,
        "arms": {arm.name: arm.title for arm in ARMS},
        "sha256": setting.sha256,
    }


if __name__ == "__main__":
    main()
