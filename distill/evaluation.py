"""How good a network is on a split."""

import torch
from torch import Tensor, nn

from .batches import Batches
from .execution import Execution


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Batches, batch_size: int, execution: Execution | None = None, as_teacher: bool = False
) -> dict[str, float]:
    """How well a classifier does in eval mode; its own mode is restored.

    Args:
        model: images [B, C, H, W] → logits [B, classes].
        data: the split.
        batch_size: images a forward pass.
        execution: how it runs; None: in float32.
        as_teacher: whether it takes the images as the teacher does.

    Returns:
        `accuracy` and `macro_f1` in 0..1, and `loss`, the mean cross-entropy. Macro-F1 is the mean over the classes
        that occur among labels or predictions, as scikit-learn's `f1_score(average="macro")` has it.
    """
    was_training = model.training
    model.eval()
    execution = execution or Execution()
    loss = torch.zeros((), device=data.device)
    confusion: Tensor | None = None
    for batch in data.in_order(batch_size):
        with execution.autocast():
            logits = model(batch.teacher_images if as_teacher else batch.images).float()
        classes = logits.shape[1]
        loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        cells = torch.bincount(batch.labels * classes + logits.argmax(dim=1), minlength=classes**2)
        confusion = cells if confusion is None else confusion + cells
    model.train(was_training)
    assert confusion is not None
    table = confusion.view(classes, classes).double()
    right, labelled, predicted = table.diagonal(), table.sum(dim=1), table.sum(dim=0)
    occurs = labelled + predicted > 0
    f1 = (2 * right[occurs] / (labelled + predicted)[occurs]).mean()
    count = labelled.sum().item()
    return {"accuracy": right.sum().item() / count, "macro_f1": f1.item(), "loss": loss.item() / count}
