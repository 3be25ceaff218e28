"""A student's step that can be repeated, with the batch in halves, if it runs out of device memory in the middle."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .batches import Batch
from .device_memory import Halving
from .hinted_student import HintedStudent
from .parts import Part, split
from .pass_snapshot import PassSnapshot
from .teacher_pass import TeacherOutputs

Compute = Callable[[list[Part]], Tensor]


class RepeatableStep:
    """Runs what a step computes; if memory runs out, leaves nothing of it behind and runs it again in halves.

    Nothing of it: no gradient, no batch-norm statistics, no drawn random number, nothing that a hint loss remembers.
    What hint losses remember is therefore kept by `keep`, after the step.

    Args:
        whole: the student with its hint terms.
        halving: whether its batches are computed in halves.
    """

    def __init__(self, whole: HintedStudent, halving: Halving) -> None:
        self._whole, self._halving = whole, halving
        for term in whole.hint_terms:
            term.loss.remembers = False
        self._snapshot = PassSnapshot(whole, whole.execution.place, whole.kept_buffers)

    def run(
        self,
        batch: Batch,
        taught: TeacherOutputs | None,
        compute: Compute,
        optimizer: torch.optim.Optimizer | None = None,
        undo: Callable[[], None] | None = None,
    ) -> Tensor:
        """What `compute` gives of the parts of a batch.

        Args:
            batch: images and labels.
            taught: what the teacher says of them.
            compute: may be called twice.
            optimizer: whose step `compute` takes at its end. Fused steps allocate their state before they write, so
                one that runs out of memory was not taken.
            undo: restores what `compute` changes beside the student.

        Raises:
            OutOfDeviceMemoryError: halves do not fit either, or the batch is too small to be halved.
        """
        states = len(optimizer.state) if optimizer else 0

        def undo_all() -> None:
            self._whole.zero_grad(set_to_none=True)
            self._whole.forget()
            self._snapshot.restore()
            if optimizer is not None:
                # Adam would take a state that it made in part for a whole one.
                for parameter in list(optimizer.state)[states:]:
                    del optimizer.state[parameter]
            if undo is not None:
                undo()

        return self._halving.run(len(batch.labels), partial(self._attempt, batch, taught, compute), undo_all)

    def keep(self) -> None:
        """Lets the hint losses keep what they saw in the step."""
        for term in self._whole.hint_terms:
            term.loss.catch_up()

    def parts(self, batch: Batch, taught: TeacherOutputs | None = None) -> list[Part]:
        """A batch as it is computed now."""
        return split(batch, taught, self._halving.bounds(len(batch.labels)), self._whole.class_weights)

    def _attempt(self, batch: Batch, taught: TeacherOutputs | None, compute: Compute) -> Tensor:
        if not self._halving.halved:
            self._snapshot.take()
        return compute(self.parts(batch, taught))
