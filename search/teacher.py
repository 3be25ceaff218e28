"""The teacher: loaded from a checkpoint, or trained once and cached by content."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..distill.data import DataSplits
from ..distill.evaluation import evaluate
from ..distill.hint_configuration import HintConfiguration
from ..distill.opening import open_batches
from ..distill.threads import torch_threads
from ..distill.trainer import Seeds
from ..models.errors import InputError
from ..models.files import replacing
from ..models.libraries import pretrained_weights
from ..models.own_code import own_code_sha256
from ..models.preprocessing import Preprocessing
from ..models.weights import StateDict, apply_weights, read_weights, save_weights, weights_sha256
from ..models.zoo import ModelSpec, build_model
from .networks import TrainedNetwork, as_arrays
from .places import cache_folder, cached_teacher_path
from .specs import teacher_spec
from .study import Study
from .study_sections import ModelSection, TeacherSection, UpperTeacherSection
from .study_types import PRETRAINED
from .training import TrainingReport, TrainingTask, train_on_cluster

# Part of the cache key: a teacher of an older trainer is another teacher.
TRAINING_VERSION = 2
CHECKED_IMAGES = 512


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready.

    Attributes:
        spec: how to build it.
        weights: its state dict.
        sha256: of the weights, whatever file they lie in.
        path: the file they lie in.
        val_accuracy: on the validation split, 0..1.
        classifies: whether its logits were trained.
    """

    spec: ModelSpec
    weights: StateDict
    sha256: str
    path: Path
    val_accuracy: float
    classifies: bool = True

    def trained(self) -> TrainedNetwork:
        """The network as it travels to other processes."""
        return TrainedNetwork(self.spec, as_arrays(self.weights))

    def network(self) -> torch.nn.Module:
        """The network with its weights, in eval mode."""
        network = build_model(self.spec)
        apply_weights(network, self.weights, str(self.path))
        return network.eval()


def upper_study(study: Study) -> Study | None:
    """The study as if its teacher were the larger network that the teacher learns from; None: it learns from none."""
    upper = study.teacher.taught_by
    if upper is None:
        return None
    section = TeacherSection(**upper.model_dump(exclude={"loss", "classification"}))
    return study.model_copy(update={"teacher": section})


def find_teacher(study: Study, splits: DataSplits) -> Teacher | None:
    """The teacher from its checkpoint or from the cache; None if it is yet to be trained.

    Raises:
        InputError: the checkpoint cannot be read, does not fit, or is no better than twice chance.
    """
    spec = teacher_spec(study, splits)
    if study.teacher.checkpoint:
        weights, path = given_weights(study.teacher)
        return _ready(study, weights, path, splits)
    above = upper_study(study)
    upper = find_teacher(above, splits) if above else None
    if above and upper is None:
        return None
    index = _cache_index(study, spec, splits, upper)
    if not index.is_file():
        return None
    path = cached_teacher_path(json.loads(index.read_text())["sha256"])
    return _ready(study, read_weights(path), path, splits) if path.is_file() else None


def given_weights(section: ModelSection) -> tuple[StateDict, Path]:
    """The weights that a network's section names, and the file they lie in; pretrained ones are put into the cache.

    Raises:
        InputError: no such file, not weights, or none that can be downloaded.
    """
    assert section.checkpoint is not None
    if section.checkpoint != PRETRAINED:
        return read_weights(Path(section.checkpoint)), Path(section.checkpoint)
    weights = pretrained_weights(section.model)
    path = cached_teacher_path(weights_sha256(weights))
    if not path.is_file():
        save_weights(path, weights)
    return weights, path


def start_weights(study: Study) -> StateDict | None:
    """The weights that the study's students start from; None: random ones. Raises as `given_weights` does."""
    return given_weights(study.student)[0] if study.student.checkpoint else None


def train_teacher(
    study: Study, splits: DataSplits, report: TrainingReport | None = None, upper: Teacher | None = None
) -> Teacher:
    """Trains the study's teacher on the cluster and puts it into the cache; Ray must be running.

    Args:
        study: its teacher section is used.
        splits: training and validation images.
        report: where the training reports to.
        upper: the larger network that it learns from, if the study names one.

    Raises:
        InputError: the trained teacher is no better than twice chance.
    """
    spec = teacher_spec(study, splits)
    epochs, index = study.teacher.recipe.epochs, _cache_index(study, spec, splits, upper)
    unfinished = index.with_suffix(".unfinished.pt")
    task = TrainingTask(
        spec,
        study.teacher.recipe.recipe(),
        (epochs,),
        Seeds(study.seed, study.seed),
        _hints(study.teacher.taught_by),
        upper.trained() if upper else None,
        checkpoint=unfinished,
    )
    weights = train_on_cluster(task, splits, study.resources, report)
    path = cached_teacher_path(weights_sha256(weights))
    teacher = _ready(study, weights, path, splits)
    save_weights(path, weights)
    with replacing(index) as temporary:
        temporary.write_text(json.dumps({"sha256": teacher.sha256, "val_accuracy": teacher.val_accuracy}))
    unfinished.unlink(missing_ok=True)
    return teacher


def _hints(taught_by: UpperTeacherSection | None) -> HintConfiguration | None:
    """How a teacher learns from a larger network."""
    if taught_by is None:
        return None
    return HintConfiguration(
        classification_weight=taught_by.classification, embedding_weight=1.0, embedding_loss=taught_by.loss
    )


def _ready(study: Study, weights: StateDict, path: Path, splits: DataSplits) -> Teacher:
    spec = teacher_spec(study, splits)
    network = build_model(spec)
    apply_weights(network, weights, str(path))
    with torch_threads(study.resources.cpus_per_trial):
        accuracy = check_teacher(network, splits, str(path), spec.preprocessing, study.teacher.has_classifier)
    return Teacher(spec, weights, weights_sha256(weights), path, accuracy, study.teacher.has_classifier)


def check_teacher(
    network: torch.nn.Module,
    splits: DataSplits,
    origin: str,
    preprocessing: Preprocessing | None = None,
    has_classifier: bool = True,
) -> float:
    """The teacher's accuracy on the validation split.

    Args:
        network: the teacher.
        splits: the validation images are read.
        origin: where its weights come from, for the message.
        preprocessing: what it takes; None: the data's own.
        has_classifier: whether its logits were trained; if not, nothing is asked of them.

    Raises:
        InputError: on the first 512 images it is no better than twice chance.
    """
    takes, device = preprocessing or splits.preprocessing, torch.device("cpu")
    first = splits.validation.subset(np.arange(min(CHECKED_IMAGES, len(splits.validation))))
    quick = evaluate(network, open_batches(first, takes, device), 256)["accuracy"]
    if has_classifier and quick <= 2 / splits.classes:
        raise InputError(
            f"the teacher {origin} has {quick:.1%} accuracy on {len(first)} validation images, but must be better than "
            f"twice chance ({2 / splits.classes:.1%}); check normalisation (data.mean, data.sd, "
            "teacher.preprocessing), class order and channel order, or train it longer"
        )
    return evaluate(network, open_batches(splits.validation, takes, device), 256)["accuracy"]


def _cache_index(study: Study, spec: ModelSpec, splits: DataSplits, upper: Teacher | None) -> Path:
    """The file that names the weights trained by this recipe on these data."""
    made_by = {
        "version": TRAINING_VERSION,
        "spec": asdict(spec),
        "code": own_code_sha256(spec.name),
        "precision": study.resources.precision,
        "data": splits.sha256(),
        "recipe": study.teacher.recipe.model_dump(),
        "seed": study.seed,
    }
    hints = _hints(study.teacher.taught_by)
    if hints is not None and upper is not None:
        made_by |= {"taught_by": upper.sha256, "hints": hints.to_dict(), "loss": own_code_sha256(hints.embedding_loss)}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "teachers" / f"{key}.json"
