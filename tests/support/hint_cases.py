"""Hint losses made for drawn features, in float64, and runs of them that always draw the same."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from hintsearch.distill.losses import (
    HINT_LOSSES,
    AnyHintLoss,
    FeatureShape,
    HintLoss,
    JointHintLoss,
    Samples,
    TeacherLayer,
)
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Shape = tuple[int, int, int, int]

# Student and teacher features [B, C, H, W]: alike, other channels, other sizes.
SHAPES: dict[str, tuple[Shape, Shape]] = {
    "alike": ((4, 3, 6, 6), (4, 3, 6, 6)),
    "channels": ((4, 3, 6, 6), (4, 5, 6, 6)),
    "larger student": ((4, 3, 6, 6), (4, 5, 3, 2)),
    "larger teacher": ((4, 3, 2, 3), (4, 5, 6, 6)),
}
# Of all training images.
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1, 2, 2, 0, 2])
TEACHER_IMAGE = (2, 4, 4)


def features(shape: tuple[int, ...], seed: int) -> Array:
    values: Array = np.random.default_rng(seed).normal(size=shape)
    return values


def samples_of(batch: int) -> Samples:
    """The first images of the training set, the last of them first."""
    indices = torch.arange(batch).flip(0)
    return Samples(indices, LABELS[indices])


@contextmanager
def same_draws(seed: int = 1) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def teacher_network(channels: int) -> nn.Sequential:
    """`conv`, `norm` and `relu` in place, with filters and batch-norm parameters of many sizes."""
    with same_draws(channels):
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        conv = nn.Conv2d(TEACHER_IMAGE[0], channels, 3, padding=1)
        nn.init.normal_(conv.weight)
        return nn.Sequential(OrderedDict(conv=conv, norm=norm, relu=nn.ReLU(inplace=True)))


def is_joint(name: str) -> bool:
    return issubclass(HINT_LOSSES.get(name), JointHintLoss)


def make_any_loss(name: str, students: Sequence[Array], teachers: Sequence[Array]) -> AnyHintLoss:
    """A loss in float64 that has read `teacher_network` and a training set of `LABELS`; it remembers no batch."""
    kind = HINT_LOSSES.get(name)
    ours, theirs = ([FeatureShape(*feature.shape[1:]) for feature in side] for side in (students, teachers))
    loss: AnyHintLoss
    with same_draws(0):
        if issubclass(kind, JointHintLoss):
            loss = kind(ours, theirs).double()
        else:
            loss = kind(ours[0], theirs[0]).double()
            loss.read_teacher(TeacherLayer(teacher_network(theirs[0].channels), "relu", TEACHER_IMAGE))
        loss.read_training_set(LABELS)
    loss.remembers = False
    return loss.double()


def make_loss(name: str, student: Array, teacher: Array) -> HintLoss:
    loss = make_any_loss(name, [student], [teacher])
    assert isinstance(loss, HintLoss)
    return loss


def make_joint_loss(name: str, students: Sequence[Array], teachers: Sequence[Array]) -> JointHintLoss:
    loss = make_any_loss(name, students, teachers)
    assert isinstance(loss, JointHintLoss)
    return loss


def tensors(arrays: Sequence[Array]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def run(loss: AnyHintLoss, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The scalar of one pair, or of several of a joint loss; the images are `samples_of` the batch."""
    with same_draws():
        if isinstance(loss, JointHintLoss):
            result: Tensor = loss(list(students), list(teachers))
        else:
            result = loss(students[0], teachers[0], samples_of(len(students[0])))
        return result


def run_parts(
    loss: AnyHintLoss, students: Sequence[Tensor], teachers: Sequence[Tensor], adapters: torch.dtype | None = None
) -> Tensor:
    """Before the mean; with `adapters` as a trainer runs them: in that precision, the loss in float32."""
    with torch.autocast("cpu", adapters, enabled=adapters is not None), same_draws():
        if isinstance(loss, JointHintLoss):
            ours, theirs = loss.adapt(list(students), list(teachers))
        else:
            ours, theirs = ([feature] for feature in loss.adapt(students[0], teachers[0]))
    if adapters is not None:
        ours, theirs = [our.float() for our in ours], [their.float() for their in theirs]
    with same_draws():
        if isinstance(loss, JointHintLoss):
            return loss.compare(ours, theirs)
        return loss.compare_samples(ours[0], theirs[0], samples_of(len(ours[0])))


def value(loss: AnyHintLoss, students: Array | Sequence[Array], teachers: Array | Sequence[Array]) -> float:
    ours, theirs = ([side] if isinstance(side, np.ndarray) else side for side in (students, teachers))
    result = run(loss, tensors(ours), tensors(theirs))
    assert result.shape == ()
    return float(result.detach())
