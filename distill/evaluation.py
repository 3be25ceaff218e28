"""How good a network is on a split."""

import torch
from torch import nn

from .batches import DeviceImages


@torch.no_grad()
def evaluate(model: nn.Module, data: DeviceImages, batch_size: int) -> dict[str, float]:
    """Accuracy and mean cross-entropy of a classifier in eval mode; its own mode is restored.

    Args:
        model: images [B, C, H, W] → logits [B, classes].
        data: the split.
        batch_size: images a forward pass.

    Returns:
        `accuracy` in 0..1 and `loss`.
    """
    was_training = model.training
    model.eval()
    correct = torch.zeros((), device=data.labels.device)
    loss = torch.zeros((), device=data.labels.device)
    for batch in data.in_order(batch_size):
        logits = model(batch.images)
        correct += (logits.argmax(dim=1) == batch.labels).sum()
        loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    model.train(was_training)
    return {"accuracy": correct.item() / len(data), "loss": loss.item() / len(data)}
