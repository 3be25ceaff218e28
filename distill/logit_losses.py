"""Losses between the logits of a student and of its teacher.

To add one, write a function here with its registration and source on top; nothing else changes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..models.registry import Registry

# (student's logits [B, C], teacher's [B, C], labels [B], temperature) → [B], of which the mean is taken, or a scalar
# where the loss is one of the whole batch. The teacher's logits carry no gradient.
LogitLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]

LOGIT_LOSSES: Registry[LogitLoss] = Registry("logit loss")

# Those whose value for an image depends on the other images of its batch.
COUPLED_LOGIT_LOSSES = frozenset({"dist"})

# Of the non-target classes, beside 1 for the target; the paper takes 2, 6 or 8, as its networks need.
DKD_BETA = 8.0
_TINY, _SMALLEST_SPREAD = 1e-7, 1e-8


@LOGIT_LOSSES.register("kd", source="Hinton et al. 2015, arXiv 1503.02531", kind="logits", needs="logits")
def kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)); logits [B, C] → [B]."""
    return temperature**2 * _divergence(student / temperature, teacher / temperature)


@LOGIT_LOSSES.register("dkd", source="Zhao et al. 2022, arXiv 2203.08679", kind="logits", needs="logits and labels")
def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """τ²·(KL of target against the rest + 8·KL among the other classes); logits [B, C], labels [B] → [B].

    The divergence among the other classes is not scaled by the teacher's doubt, as it is in `kd`.
    """
    target = labels[:, None] == torch.arange(student.shape[1], device=labels.device)
    ours, theirs = student / temperature, teacher / temperature
    of_target = _divergence(_target_and_rest(ours, target), _target_and_rest(theirs, target))
    # Of the other classes; the target has no share in either, so that it adds nothing.
    log_ours, log_theirs = (_log_shares_without(logits, target) for logits in (ours, theirs))
    of_others = (log_theirs.exp().masked_fill(target, 0) * (log_theirs - log_ours)).sum(dim=1)
    return temperature**2 * (of_target + DKD_BETA * of_others)


@LOGIT_LOSSES.register("wsl", source="Zhou et al. 2021, arXiv 2102.00650", kind="logits", needs="logits and labels")
def wsl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """τ²·(1 − exp(−CE_S/CE_T))·H(softmax(teacher/τ), softmax(student/τ)); logits [B, C], labels [B] → [B].

    The weight in front carries no gradient: images that the student knows as well as the teacher count less.
    """
    with torch.no_grad():
        ours = functional.cross_entropy(student, labels, reduction="none")
        theirs = functional.cross_entropy(teacher, labels, reduction="none")
        weight = 1 - torch.exp(-ours / theirs.clamp_min(_TINY))
    log_student = functional.log_softmax(student / temperature, dim=1)
    return -(temperature**2) * weight * (functional.softmax(teacher / temperature, dim=1) * log_student).sum(dim=1)


@LOGIT_LOSSES.register("dist", source="Huang et al. 2022, arXiv 2205.10536", kind="logits", needs="a batch of samples")
def dist(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """τ²·(1 − mean correlation of an image's probabilities + 1 − that of a class's); logits [B, C] → scalar.

    Pearson's correlations of softmax(·/τ), over the classes of each image and over the images of each class. What has
    no spread, as a class has in a batch of one image, correlates by 0.
    """
    ours, theirs = (functional.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    between = 1 - _correlation(ours, theirs).mean()
    within = 1 - _correlation(ours.t(), theirs.t()).mean()
    return temperature**2 * (between + within)


@LOGIT_LOSSES.register("kd_standardised", source="Sun et al. 2024, arXiv 2403.01427", kind="logits", needs="logits")
def kd_standardised(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`kd` of logits that are standardised for each image; [B, C] → [B]."""
    return kd(_standardised(student), _standardised(teacher), labels, temperature)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)), [B, C] → [B]."""
    log_student, log_teacher = functional.log_softmax(student, dim=1), functional.log_softmax(teacher, dim=1)
    return functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def _target_and_rest(logits: Tensor, target: Tensor) -> Tensor:
    """Logits [B, 2] of the target class, and of all others as one; `target` [B, C] is true at the target."""
    rest = logits.masked_fill(target, -torch.inf).logsumexp(dim=1)
    return torch.stack([logits.masked_fill(~target, 0).sum(dim=1), rest], dim=1)


def _log_shares_without(logits: Tensor, target: Tensor) -> Tensor:
    """Logarithms of the shares of the other classes [B, C]; 0 at the target, where there is none.

    Masks instead of indices: which would have to be counted on the device first, and waited for.
    """
    return functional.log_softmax(logits.masked_fill(target, -torch.inf), dim=1).masked_fill(target, 0)


def _correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's, of the rows of two [N, D] → [N]."""
    ours, theirs = (values - values.mean(dim=1, keepdim=True) for values in (ours, theirs))
    lengths: Tensor = torch.linalg.vector_norm(ours, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
    return (ours * theirs).sum(dim=1) / lengths.clamp_min(_SMALLEST_SPREAD)


def _standardised(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + _TINY)
