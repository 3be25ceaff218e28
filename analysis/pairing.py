"""Which student layer learns from which hint point.

A pairing gives every hint point one student layer, in depth order and never running backwards; a student layer may
serve several points. Only the control `reversed` runs backwards.
"""

from collections.abc import Callable, Sequence
from math import log

import numpy as np

from ..models.candidates import Candidate, stage_ends
from ..models.errors import InputError
from ..models.registry import Registry
from .clustering import TIE_DECIMALS
from .hint_selection import CONTROL_SELECTORS
from .layer_statistics import Matrix

BY_DEPTH = "by_depth"
BY_SIMILARITY = "by_similarity"

Pairs = tuple[tuple[Candidate, Candidate], ...]

# (hint points in depth order, number of the teacher's candidates L, the student's candidates in depth order,
# similarity [L, student candidates] or None) → (hint point, student layer) for every hint point, in depth order.
Pairing = Callable[[Sequence[Candidate], int, Sequence[Candidate], Matrix | None], Pairs]

PAIRINGS: Registry[Pairing] = Registry("pairing")


def pair_hints(
    selector: str,
    points: Sequence[Candidate],
    teacher_depth: int,
    student: Sequence[Candidate],
    pairing: str = BY_DEPTH,
    similarity: Matrix | None = None,
) -> Pairs:
    """Pairs hint points with student layers.

    Args:
        selector: what chose the points. Those of a control selector are paired by depth whatever `pairing` says, and
            those of `reversed` backwards: a control must not profit from what it is held against.
        points: the teacher's hint points in depth order, at least one.
        teacher_depth: number of the teacher's candidates L.
        student: the student's candidates in depth order, at least one.
        pairing: name of a pairing.
        similarity: of each teacher candidate with each student candidate, [L, student candidates], larger for more
            alike; only `by_similarity` reads it.

    Returns:
        (hint point, student layer), every hint point exactly once, in depth order.

    Raises:
        InputError: an unknown pairing, or no usable similarity where it is needed.
    """
    pair = PAIRINGS.get(pairing)
    if selector == "reversed":
        return pair_reversed(points, teacher_depth, student)
    if selector in CONTROL_SELECTORS:
        return pair_by_depth(points, teacher_depth, student)
    return pair(points, teacher_depth, student, similarity)


def pair_by_depth(
    points: Sequence[Candidate],
    teacher_depth: int,
    student: Sequence[Candidate],
    _similarity: Matrix | None = None,
) -> Pairs:
    """Stage ends in order, or the nearest relative depth.

    As many points as the student has stages: the ends of the student's stages, in order (PURSUhInT, Keser et al.,
    arXiv 2103.00053). Otherwise each point goes to the student candidate nearest in relative depth. Relative depth is
    index over number of candidates; a tie goes to the deeper layer.
    """
    ends = stage_ends(student)
    if len(points) == len(ends):
        return tuple(zip(points, ends, strict=True))
    return tuple((point, _nearest(point, teacher_depth, student, len(student))) for point in points)


def used_pairing(selector: str, pairing: str) -> str:
    """How `pair_hints` pairs: a control's points by depth, those of `reversed` backwards, whatever is asked for."""
    if selector not in CONTROL_SELECTORS:
        return pairing
    return "backwards" if selector == "reversed" else BY_DEPTH


PAIRINGS.register(
    BY_DEPTH,
    source="Keser et al. 2023, arXiv 2103.00053; ours for other numbers of points",
    kind="pairing",
    needs="positions",
)(pair_by_depth)


def pair_by_size(
    points: Sequence[Candidate],
    teacher_depth: int,
    student: Sequence[Candidate],
    _similarity: Matrix | None = None,
) -> Pairs:
    """The student layer with a map of the point's height and width, nearest in relative depth among those.

    Where there is none, those with the nearest number of pixels by their ratio, the smaller map on a tie. A tie in
    depth goes to the deeper layer. Only student layers from that of the previous point on come into question; where
    both networks' maps never grow with depth, this rules out nothing.
    """
    layers: list[Candidate] = []
    for point in points:
        remaining = student[layers[-1].index - 1 :] if layers else student
        layers.append(_nearest(point, teacher_depth, _nearest_in_size(point, remaining), len(student)))
    return tuple(zip(points, layers, strict=True))


PAIRINGS.register("by_size", source="ours: maps of the same size need no pooling", kind="pairing", needs="map sizes")(
    pair_by_size
)


def pair_by_similarity(
    points: Sequence[Candidate],
    teacher_depth: int,
    student: Sequence[Candidate],
    similarity: Matrix | None = None,
) -> Pairs:
    """The pairs with the largest sum of similarities of all that never run backwards, by dynamic programming.

    Of several with the same sum the deepest: there is one whose layers are all at least as deep as those of any other.

    Raises:
        InputError: `similarity` is missing, of another shape, or not finite.
    """
    gains = _checked(similarity, teacher_depth, len(student))[[point.index - 1 for point in points]]
    # The largest sum of the points so far when the last of them goes no deeper than each student layer.
    best = np.zeros(len(student))
    sums: list[Matrix] = []
    for row in gains:
        sums.append((best + row).round(TIE_DECIMALS))
        best = np.maximum.accumulate(sums[-1])
    deepest = len(student)
    layers: list[Candidate] = []
    for reached in reversed(sums):
        allowed = reached[:deepest]
        deepest = int(np.flatnonzero(allowed == allowed.max())[-1]) + 1
        layers.append(student[deepest - 1])
    return tuple(zip(points, reversed(layers), strict=True))


PAIRINGS.register(
    BY_SIMILARITY, source="ours: largest sum of similarities", kind="pairing", needs="similarity with a student"
)(pair_by_similarity)


def pair_reversed(points: Sequence[Candidate], teacher_depth: int, student: Sequence[Candidate]) -> Pairs:
    """The student layers of `pair_by_depth`, dealt out from the deepest to the shallowest (a control)."""
    forward = pair_by_depth(points, teacher_depth, student)
    return tuple(zip(points, [layer for _, layer in reversed(forward)], strict=True))


def _nearest(point: Candidate, teacher_depth: int, layers: Sequence[Candidate], student_depth: int) -> Candidate:
    wanted = point.index / teacher_depth
    return min(layers, key=lambda layer: (round(abs(layer.index / student_depth - wanted), TIE_DECIMALS), -layer.index))


def _nearest_in_size(point: Candidate, layers: Sequence[Candidate]) -> list[Candidate]:
    same = [layer for layer in layers if (layer.height, layer.width) == (point.height, point.width)]
    if same:
        return same
    pixels = min(
        {layer.height * layer.width for layer in layers},
        key=lambda count: (round(abs(log(count / (point.height * point.width))), TIE_DECIMALS), count),
    )
    return [layer for layer in layers if layer.height * layer.width == pixels]


def _checked(similarity: Matrix | None, teacher_depth: int, student_depth: int) -> Matrix:
    if similarity is None:
        raise InputError(
            "the pairing by_similarity needs the similarity of teacher and student layers, but there is none; "
            "measure it with a trained student, or choose by_depth or by_size"
        )
    if similarity.shape != (teacher_depth, student_depth):
        raise InputError(
            f"the similarity is of shape {list(similarity.shape)}, but the teacher has {teacher_depth} candidates and "
            f"the student {student_depth}; measure it anew with these two networks"
        )
    if not np.isfinite(similarity).all():
        raise InputError("the similarity of teacher and student layers is not finite everywhere; measure it anew")
    return similarity
