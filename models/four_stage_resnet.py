"""Residual networks of four stages for small images.

He et al. 2016, arXiv 1512.03385, with the stem of the small networks: a 3×3 convolution, no stride, no pooling; the
parameter names are those of the public RepDistiller checkpoints (Tian et al. 2020, arXiv 1910.10699).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .initialisation import he_by_outputs
from .pooling import GlobalAveragePool


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut; [B, in, H, W] → [B, inner, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, in_channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        # A module, so that hint losses can read what it is given.
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(in_channels, inner, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, inner, H/stride, W/stride], after the last activation."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(out + self.shortcut(x))
        return activated


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution with a shortcut; [B, in, H, W] → [B, 4·inner, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, in_channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * inner
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        # A module, so that hint losses can read what it is given.
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, 4·inner, H/stride, W/stride], after the last activation."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        activated: Tensor = self.relu(out + self.shortcut(x))
        return activated


class FourStageResNet(nn.Module):
    """Stem, four stages of blocks, global average, linear classifier.

    Args:
        block: of which kind.
        blocks: of each stage.
        channels: of the stem, and the inner ones of the four stages.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        channels: Sequence[int],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        stem, *inner = channels
        outer = [block.expansion * count for count in inner]
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(block, stem, inner[0], blocks[0], stride=1)
        self.layer2 = _stage(block, outer[0], inner[1], blocks[1], stride=2)
        self.layer3 = _stage(block, outer[1], inner[2], blocks[2], stride=2)
        self.layer4 = _stage(block, outer[2], inner[3], blocks[3], stride=2)
        self.avgpool = GlobalAveragePool()
        self.linear = nn.Linear(outer[3], num_classes)
        he_by_outputs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, inner: int, blocks: int, stride: int
) -> nn.Sequential:
    further = (block(block.expansion * inner, inner, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(in_channels, inner, stride), *further)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
