"""Retraining a student from an exported hint configuration; the only place that reads the test split."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mlflow.exceptions import MlflowException
from torch import nn

from ..analysis.pairing import BY_DEPTH, BY_SIMILARITY, pair_hints
from ..distill.batches import DeviceImages
from ..distill.data import DataSpec, DataSplits, load_data
from ..distill.evaluation import evaluate
from ..distill.hint_configuration import HintConfiguration
from ..distill.threads import torch_threads
from ..distill.trainer import EpochResult, Recipe, Seeds, Trainer
from ..models.errors import InputError, reason
from ..models.weights import StateDict, apply_weights, read_weights, save_weights, weights_sha256
from ..models.zoo import ModelSpec, build_model, check_model_name, is_own_factory, own_factory_sha256
from .export import HintFile, ModelPart, TeacherPart, check_output
from .layers import candidates_of
from .places import cache_folder, cached_teacher_path
from .tracking import connect


@dataclass(frozen=True)
class RetrainedStudent:
    """One retrained student.

    Attributes:
        data_seed: of order and augmentation.
        init_seed: of initial weights.
        validation: metrics of the last epoch.
        test_accuracy: on the test split, evaluated once, after the last epoch.
        path: where the weights lie.
    """

    data_seed: int
    init_seed: int
    validation: dict[str, float]
    test_accuracy: float
    path: Path


def distill_student(
    hints: HintFile,
    *,
    student: str | None = None,
    teacher: str | Path | None = None,
    seeds: int = 1,
    output: str | Path = "student.safetensors",
    trust_code: bool = False,
    on_epoch: Callable[[Seeds, EpochResult], None] | None = None,
) -> list[RetrainedStudent]:
    """Trains students as the file says, the first with the very seeds of the exporting trial.

    Args:
        hints: what `load_hints` read.
        student: another network, whose layers are paired anew; None: the file's.
        teacher: file of the teacher's weights; None: cache, the file's path, then MLflow.
        seeds: how many students; each further one has fresh data and init seeds.
        output: where the weights go; `-seedN` is added if there are several.
        trust_code: whether a factory of somebody's own code, named by the file, may run.
        on_epoch: called with each epoch's figures.

    Returns:
        One entry a seed.

    Raises:
        InputError: the teacher is not to be found or another one, data are missing, code is not trusted.
    """
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}, but must be at least 1")
    check_output(Path(output))
    _check_trust(hints, student, trust_code)
    spec = _student_spec(hints, student)
    mean, sd = hints.data["mean"], hints.data["sd"]
    data = {**hints.data, "mean": tuple(mean), "sd": tuple(sd)}
    splits = load_data(DataSpec(**data), cache_folder() / "data")
    configuration = _configuration(hints, spec, splits, repaired=student is not None)
    network = _teacher_network(hints.teacher, teacher) if configuration.needs_teacher else None
    # The trial's own device: another one rounds differently.
    device = "cuda" if hints.training.device == "cuda" and torch.cuda.is_available() else "cpu"
    results: list[RetrainedStudent] = []
    # As many threads as the trial had: another number rounds differently, and the figure would not be reproduced.
    with torch_threads(hints.training.threads):
        for repeat in range(seeds):
            both = Seeds(hints.training.data_seed + repeat, hints.training.init_seed + repeat)
            trainer = Trainer(
                spec,
                splits.without_test(),
                Recipe(**hints.training.recipe),
                tuple(hints.training.rungs),
                both,
                hints=configuration,
                teacher=network,
                device=device,
            )
            validation = _last_epoch(trainer, both, on_epoch)
            path = _output_path(Path(output), repeat, seeds)
            save_weights(path, trainer.student.state_dict())
            tested = _test_accuracy(trainer.student, splits, device)
            results.append(RetrainedStudent(both.data_seed, both.init_seed, validation, tested, path))
    return results


def _last_epoch(
    trainer: Trainer, seeds: Seeds, on_epoch: Callable[[Seeds, EpochResult], None] | None
) -> dict[str, float]:
    """Trains to the end; the last epoch is what counts, not the best."""
    metrics: dict[str, float] = {}
    for result in trainer.epochs():
        metrics = result.metrics
        if on_epoch:
            on_epoch(seeds, result)
    return metrics


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
    for path in (cached_teacher_path(teacher.sha256), Path(teacher.path)):
        there = _readable(path)
        if there is not None and weights_sha256(there) == teacher.sha256:
            return there
    weights = _from_mlflow(teacher)
    if weights_sha256(weights) != teacher.sha256:
        raise InputError(
            f"the teacher in {teacher.tracking_uri} is not the one the hints were found for (its sha256 differs from "
            f"{teacher.sha256[:12]}); give its file by --teacher PATH"
        )
    save_weights(cached_teacher_path(teacher.sha256), weights)
    return weights


def _readable(path: Path) -> StateDict | None:
    """The weights in a file that may be missing or damaged: there are further places to look."""
    try:
        return read_weights(path)
    except InputError:
        return None


def _from_mlflow(teacher: TeacherPart) -> StateDict:
    try:
        client = connect(teacher.tracking_uri, create=False)
        return read_weights(Path(client.download_artifacts(teacher.run_id, teacher.artifact)))
    except (MlflowException, OSError, InputError) as error:
        raise InputError(
            f"the teacher's weights (sha256 {teacher.sha256[:12]}) are neither in the cache nor at {teacher.path} nor "
            f"in MLflow at {teacher.tracking_uri} ({reason(error)}); give their file by --teacher PATH"
        ) from error


def _check_trust(hints: HintFile, student: str | None, trust_code: bool) -> None:
    """A file from a stranger must not run code unasked, nor other code than it was exported with."""
    parts: list[ModelPart] = [hints.teacher] if student else [hints.teacher, hints.student]
    for part in parts:
        if not is_own_factory(part.model):
            continue
        if not trust_code:
            raise InputError(f"the hint file names the code {part.model}; look at it, then add --trust-code to run it")
        check_model_name(part.model)
        if own_factory_sha256(part.model) != part.factory_sha256:
            raise InputError(f"{part.model} has changed since the export; bring the file back, or search again")


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
    points = [by_path[pair.teacher_layer] for pair in configuration.pairs]
    selector = hints.selection.selector if hints.selection else ""
    # Similarities were measured with the exported student, and say nothing of another one.
    pairing = hints.selection.pairing if hints.selection else BY_DEPTH
    pairing = BY_DEPTH if pairing == BY_SIMILARITY else pairing
    layers = pair_hints(selector, points, len(teacher), candidates_of(spec, splits.image_shape), pairing)
    pairs = [
        replace(pair, student_layer=layer.path) for pair, (_, layer) in zip(configuration.pairs, layers, strict=True)
    ]
    return replace(configuration, pairs=tuple(pairs))


def _teacher_network(teacher: TeacherPart, given: str | Path | None) -> nn.Module:
    weights = find_teacher_weights(teacher, given)
    network = build_model(teacher.spec())
    apply_weights(network, weights, teacher.model)
    return network.eval()


def _test_accuracy(student: nn.Module, splits: DataSplits, device: str) -> float:
    if splits.test is None:
        raise InputError("the data have no test split; give test.npz or a data.test_fraction")
    test = DeviceImages(splits.test, splits.mean, splits.sd, torch.device(device))
    return evaluate(student, test, 256)["accuracy"]


def _output_path(output: Path, repeat: int, seeds: int) -> Path:
    return output if seeds == 1 else output.with_name(f"{output.stem}-seed{repeat}{output.suffix}")
