"""The parts in which a batch is computed: itself, two halves, or a worker's share; their losses add up to its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .batches import Batch
from .teacher_pass import TeacherOutputs


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one.

    Attributes:
        batch: images and labels.
        taught: what the teacher says of them; None if nothing reads it.
        images: their share of the whole batch's images, 0..1: what a mean over the images counts for.
        labels: the share of their class weights, 0..1: what the cross-entropy, a weighted mean, counts for.
    """

    batch: Batch
    taught: TeacherOutputs | None
    images: float = 1.0
    labels: Tensor | float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether it is a batch, and nothing need be scaled."""
        return self.images == 1.0


def split(
    batch: Batch, taught: TeacherOutputs | None, bounds: Sequence[tuple[int, int]], class_weights: Tensor | None
) -> list[Part]:
    """The parts of a batch.

    Args:
        batch: images and labels, of the whole or of a share of it.
        taught: what the teacher says of them.
        bounds: where each part starts and stops.
        class_weights: of each class's images [classes]; None: all count the same.
    """
    if len(bounds) == 1 and batch.whole is None:
        return [Part(batch, taught)]
    whole = batch.labels if batch.whole is None else batch.whole.labels

    def share_of_labels(labels: Tensor) -> Tensor | float:
        if class_weights is None:
            return len(labels) / len(whole)
        return class_weights[labels].sum() / class_weights[whole].sum()

    return [
        Part(
            batch.part(start, stop),
            None if taught is None else taught.part(start, stop),
            (stop - start) / len(whole),
            share_of_labels(batch.labels[start:stop]),
        )
        for start, stop in bounds
    ]
