"""Which student layer learns from which hint point."""

from collections.abc import Sequence

from ..models.candidates import Candidate, stage_ends


def pair_hints(
    selector: str, points: Sequence[Candidate], teacher_depth: int, student: Sequence[Candidate]
) -> tuple[tuple[Candidate, Candidate], ...]:
    """Pairs hint points with student layers as their selector wants: by depth, or backwards for `reversed`."""
    pair = pair_reversed if selector == "reversed" else pair_by_depth
    return pair(points, teacher_depth, student)


def pair_by_depth(
    points: Sequence[Candidate], teacher_depth: int, student: Sequence[Candidate]
) -> tuple[tuple[Candidate, Candidate], ...]:
    """Pairs every hint point with a student layer, never running backwards.

    As many points as the student has stages: the ends of the student's stages, in order (PURSUhInT, Keser et al.,
    arXiv 2103.00053). Otherwise each point goes to the student candidate nearest in relative depth; a student layer may
    serve several points. Relative depth is index over number of candidates; a tie goes to the deeper layer.

    Args:
        points: the teacher's hint points in depth order, at least one.
        teacher_depth: number of the teacher's candidates L.
        student: the student's candidates in depth order, at least one.

    Returns:
        (hint point, student layer), every hint point exactly once, in depth order.
    """
    ends = stage_ends(student)
    if len(points) == len(ends):
        return tuple(zip(points, ends, strict=True))
    return tuple((point, _nearest(point.index / teacher_depth, student)) for point in points)


def pair_reversed(
    points: Sequence[Candidate], teacher_depth: int, student: Sequence[Candidate]
) -> tuple[tuple[Candidate, Candidate], ...]:
    """The student layers of `pair_by_depth`, dealt out from the deepest to the shallowest (a control)."""
    forward = pair_by_depth(points, teacher_depth, student)
    return tuple(zip(points, [layer for _, layer in reversed(forward)], strict=True))


def _nearest(relative_depth: float, student: Sequence[Candidate]) -> Candidate:
    size = len(student)
    return min(student, key=lambda layer: (round(abs(layer.index / size - relative_depth), 12), -layer.index))
