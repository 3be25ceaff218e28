"""How good a network is on a split."""

import math

import torch
from torch import Tensor, nn

from .batches import Batch, Batches
from .device_memory import Halving
from .execution import Execution


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Batches,
    batch_size: int,
    execution: Execution | None = None,
    as_teacher: bool = False,
    halving: Halving | None = None,
) -> dict[str, float]:
    """How well a classifier does in eval mode; its own mode is restored.

    Args:
        model: images [B, C, H, W] → logits [B, classes].
        data: the split.
        batch_size: images a forward pass.
        execution: how it runs, and with which workers, each of which has a share of the images and gets the figures of
            all; None: in float32, alone.
        as_teacher: whether it takes the images as the teacher does.
        halving: whether batches are computed in halves; None: only if this evaluation runs out of memory.

    Returns:
        `accuracy` and `macro_f1` in 0..1, and `loss`, the mean cross-entropy. Macro-F1 is the mean over the classes
        that occur among labels or predictions, as scikit-learn's `f1_score(average="macro")` has it.
    """
    was_training = model.training
    model.eval()
    execution, halving = execution or Execution(), halving or Halving("the evaluation", data.device)

    def judged(batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, and how often each class was taken for each [classes²]."""
        with execution.autocast():
            logits = model(batch.teacher_images if as_teacher else batch.images).float()
        classes = logits.shape[1]
        entropy = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        return entropy, torch.bincount(batch.labels * classes + logits.argmax(dim=1), minlength=classes**2)

    loss = torch.zeros((), device=data.device)
    confusion: Tensor | None = None
    for batch in data.in_order(batch_size, execution.workers):
        for entropy, cells in halving.each(batch, judged):
            loss += entropy
            confusion = cells if confusion is None else confusion + cells
    model.train(was_training)
    assert confusion is not None
    execution.workers.add([loss, confusion])
    classes = math.isqrt(len(confusion))
    table = confusion.view(classes, classes).double()
    right, labelled, predicted = table.diagonal(), table.sum(dim=1), table.sum(dim=0)
    occurs = labelled + predicted > 0
    f1 = (2 * right[occurs] / (labelled + predicted)[occurs]).mean()
    count = labelled.sum().item()
    return {"accuracy": right.sum().item() / count, "macro_f1": f1.item(), "loss": loss.item() / count}
