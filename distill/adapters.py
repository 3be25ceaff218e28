"""Trained layers that bring a student's features to a teacher's form."""

import torch.nn.functional as functional
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that also takes a batch of one value a channel, which has no variance: by its running statistics."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] → the same."""
        if features.numel() > features.shape[1]:
            return super().forward(features)
        return functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def connector(channels: int, wanted: int) -> nn.Sequential:
    """A 1×1 convolution and its batch norm, from `channels` to `wanted`."""
    return nn.Sequential(nn.Conv2d(channels, wanted, 1, bias=False), BatchNorm(wanted))
