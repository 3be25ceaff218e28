"""Retraining a student from an exported hint configuration; the only place that reads the test split."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from torch import nn

from ..analysis.pairing import BY_DEPTH, BY_SIMILARITY, pair_hints
from ..distill.data import DataSpec, DataSplits, load_data
from ..distill.evaluation import evaluate
from ..distill.execution import Execution, best_precision
from ..distill.hint_configuration import HintConfiguration
from ..distill.opening import open_batches
from ..distill.recipe import PRESETS, Recipe
from ..distill.retrieval import retrieval
from ..distill.threads import torch_threads
from ..distill.trainer import EpochResult, GroupTrainer, TaughtStudent, TeacherNetwork
from ..models.errors import InputError, reason
from ..models.own_code import check_own_code, is_own_code, own_code_path, own_code_sha256
from ..models.penultimate import classifier_path
from ..models.weights import StateDict, apply_weights, read_weights, save_weights, weights_sha256
from ..models.zoo import ModelSpec, build_model, check_model_name
from .collector import collect_as_usual
from .export import HintFile, StartPart, TeacherPart, check_output
from .layers import candidates_of
from .places import cache_folder, cached_teacher_path
from .study_types import RETRIEVAL_OBJECTIVES
from .tracking import connect


@dataclass(frozen=True)
class RetrainedStudent:
    """One retrained student.

    Attributes:
        data_seed: of order and augmentation; the same for all.
        init_seed: of initial weights.
        validation: metrics of the last epoch.
        test: `accuracy`, `macro_f1` and `loss` on the test split, evaluated once, after the last epoch; `map_cosine`
            and the like if the search was decided by rankings.
        path: where the weights lie.
    """

    data_seed: int
    init_seed: int
    validation: dict[str, float]
    test: dict[str, float]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return {**asdict(self), "test_accuracy": self.test_accuracy}

    @property
    def test_accuracy(self) -> float:
        """On the test split, 0..1."""
        return self.test["accuracy"]


def distill_student(
    hints: HintFile,
    *,
    student: str | None = None,
    teacher: str | Path | None = None,
    seeds: int = 1,
    output: str | Path = "student.safetensors",
    trust_code: bool = False,
    preset: str | None = None,
    on_epoch: Callable[[int, EpochResult], None] | None = None,
) -> list[RetrainedStudent]:
    """Trains students as the file says, the first with the very seeds of the exporting trial.

    All are trained on one stream of images and teacher outputs; each further one has fresh initial weights.

    Args:
        hints: what `load_hints` read.
        student: another network, whose layers are paired anew; None: the file's.
        teacher: file of the teacher's weights; None: cache, the file's path, then MLflow.
        seeds: how many students.
        output: where the weights go; `-seedN` is added if there are several.
        trust_code: whether a factory of somebody's own code, named by the file, may run.
        preset: a published recipe, with its epochs, instead of the file's.
        on_epoch: called with each student's init seed and epoch figures.

    Returns:
        One entry a seed.

    Raises:
        InputError: the teacher is not to be found or another one, data are missing, code is not trusted.
    """
    collect_as_usual()
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}, but must be at least 1")
    check_output(Path(output))
    _check_trust(hints, student, trust_code)
    spec = _student_spec(hints, student)
    data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in hints.data.items()}
    splits = load_data(DataSpec(**data), cache_folder() / "data")
    configuration = _configuration(hints, spec, splits, repaired=student is not None)
    network = _teacher_network(hints.teacher, teacher) if configuration.needs_teacher else None
    recipe, rungs = _schedule(hints, spec, preset)
    training = hints.training
    execution = distill_execution(hints)
    # Of another network, the weights that the exported student starts from are none.
    start = _start_weights(hints) if student is None else None
    rankings = hints.evidence.metric in RETRIEVAL_OBJECTIVES
    init_seeds = [training.init_seed + repeat for repeat in range(seeds)]
    # As many threads as the trial had: another number rounds differently, and the figure would not be reproduced.
    with torch_threads(training.threads):
        trainer = GroupTrainer(
            spec,
            splits.without_test(),
            recipe,
            rungs,
            [TaughtStudent(configuration, seed) for seed in init_seeds],
            training.data_seed,
            teacher=network,
            start=start,
            execution=execution,
            rankings=rankings,
            side_by_side=max(1, (os.cpu_count() or 1) // training.threads),
        )
        validations = _last_epoch(trainer, init_seeds, on_epoch)
        return [
            _finished(trained, validation, seed, training.data_seed, spec, splits, execution, path, rankings)
            for trained, validation, seed, path in zip(
                trainer.networks, validations, init_seeds, _output_paths(Path(output), seeds), strict=True
            )
        ]


def distill_execution(hints: HintFile) -> Execution:
    """Where and how `distill_student` computes: as the trial did, as far as this machine has what it takes."""
    # The trial's own device: another one rounds differently.
    device = "cuda" if hints.training.device == "cuda" and torch.cuda.is_available() else "cpu"
    precision = hints.training.precision
    if precision == "bf16":
        # Emulated, it would be many times slower than fp32.
        precision, _ = best_precision(device)
    return Execution(device, precision, hints.training.compile)


def _last_epoch(
    trainer: GroupTrainer, init_seeds: list[int], on_epoch: Callable[[int, EpochResult], None] | None
) -> list[dict[str, float]]:
    """Trains to the end; the last epoch is what counts, not the best. One student's metrics each."""
    metrics: list[dict[str, float]] = []
    for results in trainer.epochs():
        metrics = [result.metrics for result in results]
        if on_epoch:
            for seed, result in zip(init_seeds, results, strict=True):
                on_epoch(seed, result)
    return metrics


def _finished(
    network: nn.Module,
    validation: dict[str, float],
    init_seed: int,
    data_seed: int,
    spec: ModelSpec,
    splits: DataSplits,
    execution: Execution,
    path: Path,
    rankings: bool,
) -> RetrainedStudent:
    """Saves a trained student and tests it, once."""
    save_weights(path, network.state_dict())
    if splits.test is None:
        raise InputError("the data have no test split; give test.npz or a data.test_fraction")
    test = open_batches(splits.test, spec.preprocessing or splits.preprocessing, execution.place)
    tested = evaluate(network, test, 256, execution)
    if rankings:
        database = open_batches(splits.train, spec.preprocessing or splits.preprocessing, execution.place)
        classifier = classifier_path(network, spec.input_shape(splits.image_shape))
        tested |= retrieval(network, classifier, database, test, 256, execution)
    return RetrainedStudent(data_seed, init_seed, validation, tested, path)


def _schedule(hints: HintFile, spec: ModelSpec, preset: str | None) -> tuple[Recipe, tuple[int, ...]]:
    """Recipe and rungs: the exported ones unless a preset replaces them."""
    if preset is None:
        return Recipe(**hints.training.recipe), tuple(hints.training.rungs)
    published = PRESETS.get(preset)
    return published.recipe_of(spec.name), (published.epochs,)


def find_teacher_weights(teacher: TeacherPart, given: str | Path | None = None) -> StateDict:
    """The teacher's weights: the given file, else the cache, the file's path, then MLflow; their sha256 is checked.

    Raises:
        InputError: they are nowhere, or a file has other weights.
    """
    if given is not None:
        weights = read_weights(Path(given))
        found = weights_sha256(weights)
        if found != teacher.sha256:
            raise InputError(
                f"the weights of {given} have sha256 {found[:12]}, but the hints were found for a teacher with "
                f"{teacher.sha256[:12]}; give that teacher's file"
            )
        return weights
    return _recorded_weights("the teacher's weights", teacher, teacher, "give their file by --teacher PATH")


def _start_weights(hints: HintFile) -> StateDict | None:
    """What the exported student starts from; None: random weights."""
    if hints.student.start is None:
        return None
    mend = "bring the file back, or name another student by --student"
    return _recorded_weights("the weights the student starts from", hints.student.start, hints.teacher, mend)


def _recorded_weights(what: str, weights: TeacherPart | StartPart, store: TeacherPart, mend: str) -> StateDict:
    """Weights by their sha256: from the cache, the recorded path, or the tracking store of the search."""
    for path in (cached_teacher_path(weights.sha256), Path(weights.path)):
        there = _readable(path)
        if there is not None and weights_sha256(there) == weights.sha256:
            return there
    try:
        client = connect(store.tracking_uri, create=False)
        found = read_weights(Path(client.download_artifacts(store.run_id, weights.artifact)))
    except (MlflowException, OSError, InputError) as error:
        raise InputError(
            f"{what} (sha256 {weights.sha256[:12]}) are neither in the cache nor at {weights.path} nor in MLflow at "
            f"{store.tracking_uri} ({reason(error)}); {mend}"
        ) from error
    if weights_sha256(found) != weights.sha256:
        raise InputError(
            f"{what} in {store.tracking_uri} are not those the hints were found with (their sha256 differs from "
            f"{weights.sha256[:12]}); {mend}"
        )
    save_weights(cached_teacher_path(weights.sha256), found)
    return found


def _readable(path: Path) -> StateDict | None:
    """The weights in a file that may be missing or damaged: there are further places to look."""
    try:
        return read_weights(path)
    except InputError:
        return None


def code_of_hints(hints: HintFile, student: str | None = None) -> list[tuple[str, str, str | None]]:
    """What own code a hint file names: its purpose, its name, and its hash at the export.

    Args:
        hints: what `load_hints` read.
        student: another network, which stands in for the file's.
    """
    named = [
        ("teacher", hints.teacher.model, hints.teacher.factory_sha256),
        ("student", hints.student.model, hints.student.factory_sha256),
        ("data", str(hints.data.get("name")), hints.data_code_sha256),
        *(("loss", name, hints.hints.loss_code_sha256.get(name)) for name in hints.hints.losses()),
    ]
    return [entry for entry in named if is_own_code(entry[1]) and not (student and entry[0] == "student")]


def _check_trust(hints: HintFile, student: str | None, trust_code: bool) -> None:
    """A file from a stranger must not run code unasked, nor other code than it was exported with."""
    named = code_of_hints(hints, student)
    if named and not trust_code:
        listed = ", ".join(
            f"{name} ({what}; {own_code_path(name) or 'not here'}, sha256 {(sha256 or 'unknown')[:12]} at the export)"
            for what, name, sha256 in named
        )
        raise InputError(f"the hint file names the code {listed}; look at it, then add --trust-code to run it")
    for purpose, name, sha256 in named:
        check_own_code(name, {"data": "data set", "loss": "loss"}.get(purpose, "model"))
        if own_code_sha256(name) != sha256:
            raise InputError(f"{name} has changed since the export; bring the file back, or search again")


def _student_spec(hints: HintFile, student: str | None) -> ModelSpec:
    if student is None:
        return hints.student.spec()
    check_model_name(student)
    return ModelSpec(student, hints.student.num_classes, hints.student.in_channels)


def _configuration(hints: HintFile, spec: ModelSpec, splits: DataSplits, repaired: bool) -> HintConfiguration:
    """The file's configuration, its hint points paired anew if the student is another one."""
    configuration = hints.hints.configuration()
    if not repaired or not configuration.pairs:
        return configuration
    teacher = candidates_of(hints.teacher.spec(), splits.image_shape, hints.teacher.candidates)
    by_path = {candidate.path: candidate for candidate in teacher}
    # A point stands in as many pairs as it has losses.
    points = [by_path[path] for path in dict.fromkeys(pair.teacher_layer for pair in configuration.pairs)]
    selector = hints.selection.selector if hints.selection else ""
    # Similarities were measured with the exported student, and say nothing of another one.
    pairing = hints.selection.pairing if hints.selection else BY_DEPTH
    pairing = BY_DEPTH if pairing == BY_SIMILARITY else pairing
    paired = pair_hints(selector, points, len(teacher), candidates_of(spec, splits.image_shape), pairing)
    layers = {point.path: layer.path for point, layer in paired}
    pairs = [replace(pair, student_layer=layers[pair.teacher_layer]) for pair in configuration.pairs]
    return replace(configuration, pairs=tuple(pairs))


def _teacher_network(teacher: TeacherPart, given: str | Path | None) -> TeacherNetwork:
    spec = teacher.spec()
    network = build_model(spec)
    apply_weights(network, find_teacher_weights(teacher, given), teacher.model)
    return TeacherNetwork(network, spec.preprocessing)


def _output_paths(output: Path, seeds: int) -> Iterator[Path]:
    for repeat in range(seeds):
        yield output if seeds == 1 else output.with_name(f"{output.stem}-seed{repeat}{output.suffix}")
