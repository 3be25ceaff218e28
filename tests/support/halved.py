"""What tests of trainings in halves compare."""

import pytest
import torch
from hintsearch.distill.trainer import Trainer
from small_training import figures
from torch import Tensor

Run = tuple[list[dict[str, float]], list[Tensor]]


def run(trainer: Trainer) -> Run:
    """The figures of all epochs, and the weights at the end."""
    return figures(trainer.epochs()), list(trainer.student.state_dict().values())


def assert_alike(found: Run, expected: Run) -> None:
    """But for rounding, and for what is said of halves."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        shared = {name: value for name, value in ours.items() if name not in ("accumulation_steps", "halved_passes")}
        assert shared == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
