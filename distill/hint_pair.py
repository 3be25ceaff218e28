"""A teacher's layer and the student's layer that learns from it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HintPair:
    """A teacher hint point and the student layer that learns from it.

    Attributes:
        teacher_layer: module path in the teacher.
        student_layer: module path in the student.
        loss: name of the hint loss; two layers may stand in several pairs, each with a loss of its own.
        weight: β, its weight after normalisation.
    """

    teacher_layer: str
    student_layer: str
    loss: str
    weight: float
