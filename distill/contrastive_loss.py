"""Contrastive representation distillation: an image's features against those that are remembered of other images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..models.errors import InputError
from .batches import Samples
from .hint_loss import HINT_LOSSES, FeatureShape, HintLoss

_TINY = 1e-7
# Up to so many times the negatives, products with all images that are remembered are cheaper than reading some.
_CHEAPER_WHOLE = 8


@dataclass(frozen=True)
class _Seen:
    """What a batch leaves behind: its images, their embeddings of length 1, and the partitions of then."""

    indices: Tensor
    student: Tensor
    teacher: Tensor
    partitions: Tensor


@HINT_LOSSES.register(
    "crd",
    source="Tian et al. 2020, arXiv 1910.10699",
    kind="hint",
    needs="two linear layers; two memories of 128 values for each training image",
)
class ContrastiveRepresentationDistillation(HintLoss):
    """Noise-contrastive estimation: which of 16384 remembered images and itself an image is, both ways, added.

    Spatial means are embedded by trained linear layers and scaled to length 1; the negatives are drawn with
    replacement from the images of other classes, no more than there are images. Memories hold each image's last
    embeddings, the old ones with a momentum of 0.5.
    """

    draws = couples = True
    kept = ("student_memory", "teacher_memory", "partitions", "_by_class", "_class_start", "_class_size")
    VALUES, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5

    student_memory: Tensor
    teacher_memory: Tensor
    partitions: Tensor
    _by_class: Tensor
    _class_start: Tensor
    _class_size: Tensor

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.student_embedding = nn.Linear(student.channels, self.VALUES)
        self.teacher_embedding = nn.Linear(teacher.channels, self.VALUES)
        self._later: list[_Seen] = []

    def read_training_set(self, labels: Tensor) -> None:
        """Makes the memories, with random directions, and notes which images are of one class.

        Raises:
            InputError: all images are of one class.
        """
        sizes = torch.bincount(labels)
        if sizes.max() == len(labels):
            raise InputError("crd takes negatives from other classes, but all training images are of one; use another")
        bound = 1 / math.sqrt(self.VALUES / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(labels), self.VALUES).uniform_(-bound, bound))
        # Of the student's embeddings among the teacher's, and the other way round; set by the first batch.
        self.register_buffer("partitions", torch.zeros(2))
        self.register_buffer("_by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("_class_start", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("_class_size", sizes, persistent=False)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, 128] each."""
        return self.student_embedding(student.mean(dim=(2, 3))), self.teacher_embedding(teacher.mean(dim=(2, 3)))

    def compare_samples(self, student: Tensor, teacher: Tensor, samples: Samples) -> Tensor:
        """[B, 128] each → [B]."""
        student, teacher = functional.normalize(student, dim=1), functional.normalize(teacher, dim=1)
        chosen = torch.cat([samples.indices[:, None], self._negatives(samples.labels)], dim=1)
        scores = (
            _scores(student, self.teacher_memory, chosen, self.TEMPERATURE),
            _scores(teacher, self.student_memory, chosen, self.TEMPERATURE),
        )
        images = len(self.student_memory)
        with torch.no_grad():
            first = torch.stack([score.mean() * images for score in scores])
            partitions = torch.where(self.partitions > 0, self.partitions, first)
        seen = _Seen(samples.indices, student.detach(), teacher.detach(), partitions)
        if self.remembers:
            self._keep(seen)
        elif all(samples.indices is not earlier.indices for earlier in self._later):
            self._later.append(seen)
        noise = (chosen.shape[1] - 1) / images
        return sum(
            (_noise_contrastive(score / partition, noise) for score, partition in zip(scores, partitions, strict=True)),
            start=student.new_zeros(len(student)),
        )

    def catch_up(self) -> None:
        """Keeps what the first pass over each batch without `remembers` would have kept."""
        for seen in self._later:
            self._keep(seen)
        self.forget()

    def forget(self) -> None:
        """Keeps nothing of the passes without `remembers`."""
        self._later.clear()

    @torch.no_grad()
    def _keep(self, seen: "_Seen") -> None:
        # Of the very first batch's halves each has its own.
        self.partitions.copy_(torch.where(self.partitions > 0, self.partitions, seen.partitions))
        for memory, vectors in ((self.student_memory, seen.student), (self.teacher_memory, seen.teacher)):
            mixed = self.MOMENTUM * memory[seen.indices] + (1 - self.MOMENTUM) * vectors
            memory.index_copy_(0, seen.indices, functional.normalize(mixed, dim=1).to(memory.dtype))

    def _negatives(self, labels: Tensor) -> Tensor:
        """Indices [B, K] of images of other classes, drawn from torch's global generator."""
        images = len(self._by_class)
        start, size = self._class_start[labels][:, None], self._class_size[labels][:, None]
        count = min(self.NEGATIVES, images)
        # Places in the order by class, with a gap where the own class is.
        drawn = torch.rand(len(labels), count, device=labels.device, dtype=torch.float64)
        place = (drawn * (images - size)).long()
        return self._by_class[place + size * (place >= start)]


def _scores(vectors: Tensor, memory: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """exp(v·m/τ) of [B, D] with the remembered ones `chosen` [B, K] → [B, K]; the memory carries no gradient."""
    if len(memory) <= _CHEAPER_WHOLE * chosen.shape[1]:
        # A copy, for the memory changes before the gradient is computed.
        products = (vectors @ memory.clone().t()).gather(1, chosen)
    else:
        products = torch.bmm(memory[chosen], vectors[:, :, None])[:, :, 0]
    return (products / temperature).exp()


def _noise_contrastive(probabilities: Tensor, noise: float) -> Tensor:
    """-log of recognising the first as itself and all others as noise, [B, 1 + K] → [B]."""
    whole = probabilities + noise + _TINY
    return -(probabilities[:, 0] / whole[:, 0]).log() - (noise / whole[:, 1:]).log().sum(dim=1)
