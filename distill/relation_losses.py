"""Hint losses that compare how the images of a batch lie to each other.

They need a batch: of a single image they are 0. Those that compare vectors take the spatial mean of each channel, which
at the penultimate layer is what the papers use. To add one, write a small class here with its registration and source
on top; nothing else changes.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .hint_loss import HINT_LOSSES, FeatureShape, HintLoss

_TINY = 1e-7
# Below which two images are the same.
_SMALLEST_SQUARE = 1e-12


@HINT_LOSSES.register("sp", source="Tung & Mori 2019, arXiv 1907.09682", kind="hint", needs="a batch of samples")
class SimilarityPreserving(HintLoss):
    """Mean squared difference of the row-normalised similarities between the samples of a batch."""

    couples = True

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B], of the rows."""
        return (_similarities(student) - _similarities(teacher)).square().mean(dim=1)


@HINT_LOSSES.register(
    "cc", source="Peng et al. 2019, arXiv 1904.01802", kind="hint", needs="a batch of samples, two linear layers"
)
class CorrelationCongruence(HintLoss):
    """Products of the errors of neighbouring images, after trained linear layers to 128 values.

    The form of RepDistiller, which has it from the authors.
    """

    couples = True

    VALUES = 128

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.student_embedding = nn.Linear(student.channels, self.VALUES)
        self.teacher_embedding = nn.Linear(teacher.channels, self.VALUES)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, 128] each."""
        return self.student_embedding(_pooled(student)), self.teacher_embedding(_pooled(teacher))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, 128] each → scalar."""
        error = (student - teacher).abs()
        return (error[:-1] * error[1:]).sum() / max(len(error) - 1, 1)


@HINT_LOSSES.register("rkd", source="Park et al. 2019, arXiv 1904.05068", kind="hint", needs="a batch of samples")
class RelationalKnowledgeDistillation(HintLoss):
    """25 × the Huber loss of relative distances between two images + 50 × that of the angles among three."""

    couples = True

    DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar."""
        student, teacher = _pooled(student), _pooled(teacher)
        distance = functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        angle = functional.smooth_l1_loss(_angles(student), _angles(teacher))
        return self.DISTANCE_WEIGHT * distance + self.ANGLE_WEIGHT * angle


@HINT_LOSSES.register("pkt", source="Passalis & Tefas 2018, arXiv 1803.10837", kind="hint", needs="a batch of samples")
class ProbabilisticKnowledgeTransfer(HintLoss):
    """Divergence of the student's from the teacher's affinities (cosine, rows that sum to 1), mean over the pairs."""

    couples = True

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B], of the rows."""
        ours, theirs = (_shares(_cosines(_pooled(feature))) for feature in (student, teacher))
        return (theirs * _log_ratio(theirs, ours)).mean(dim=1)


@HINT_LOSSES.register(
    "pkt_symmetric",
    source="Sarridis et al. 2022, arXiv 2205.10003 (the main stage of InDistill)",
    kind="hint",
    needs="a batch of samples",
)
class SymmetricProbabilisticKnowledgeTransfer(HintLoss):
    """Jeffreys' divergences of two affinities, the cosine's and 1/(1 + distance), added; mean over the pairs."""

    couples = True

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B], of the rows."""
        student, teacher = _pooled(student), _pooled(teacher)
        of_cosines = _jeffreys(_shares(_cosines(student)), _shares(_cosines(teacher)))
        return of_cosines + _jeffreys(_shares(_nearness(student)), _shares(_nearness(teacher)))


def _pooled(feature: Tensor) -> Tensor:
    """[B, C, H, W] → [B, C]."""
    return feature.mean(dim=(2, 3))


def _similarities(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    return functional.normalize(torch.mm(flat, flat.t()), dim=1)


def _distances(vectors: Tensor) -> Tensor:
    """Euclidean, [B, D] → [B, B]; 0 on the diagonal, with a finite gradient where two images are the same."""
    squares = vectors.square().sum(dim=1)
    between = (squares[:, None] + squares[None, :] - 2 * vectors @ vectors.t()).clamp_min(_SMALLEST_SQUARE).sqrt()
    return between.masked_fill(torch.eye(len(vectors), dtype=torch.bool, device=vectors.device), 0)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Distances over their mean, [B, D] → [B, B]."""
    distances = _distances(vectors)
    pairs = len(vectors) * (len(vectors) - 1)
    return distances / (distances.sum() / max(pairs, 1)).clamp_min(_TINY)


def _angles(vectors: Tensor) -> Tensor:
    """Cosine at each image between each two others, [B, D] → [B, B, B]; 0 where one of them is the same image."""
    towards = vectors[None, :, :] - vectors[:, None, :]
    # Without a direction there is none to change: normalising it would make its gradient all but infinite.
    same = towards.square().sum(dim=2, keepdim=True) <= _SMALLEST_SQUARE
    directions = functional.normalize(towards.masked_fill(same, 0), dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def _cosines(vectors: Tensor) -> Tensor:
    """Between each two, scaled to 0..1, [B, D] → [B, B]."""
    units = functional.normalize(vectors, dim=1)
    return (units @ units.t() + 1) / 2


def _nearness(vectors: Tensor) -> Tensor:
    """1/(1 + distance), [B, D] → [B, B]."""
    return 1 / (1 + _distances(vectors))


def _log_ratio(shares: Tensor, others: Tensor) -> Tensor:
    return ((shares + _TINY) / (others + _TINY)).log()


def _jeffreys(ours: Tensor, theirs: Tensor) -> Tensor:
    """The divergence both ways, mean over a row; [B, B] each → [B]."""
    return ((theirs - ours) * _log_ratio(theirs, ours)).mean(dim=1)


def _shares(affinities: Tensor) -> Tensor:
    return affinities / affinities.sum(dim=1, keepdim=True)
