"""Wide residual networks for small images.

Zagoruyko and Komodakis 2016, arXiv 1605.07146; the parameter names are those of the public RepDistiller checkpoints
(Tian et al. 2020, arXiv 1910.10699).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .initialisation import he_by_outputs
from .pooling import GlobalAveragePool


class PreActivationBlock(nn.Module):
    """Two 3×3 convolutions, each after norm and activation; [B, in, H, W] → [B, out, H/stride, W/stride].

    Where the number of channels changes, the shortcut is a 1×1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H/stride, W/stride], before the next activation."""
        activated = torch.relu(self.bn1(x))
        out = torch.relu(self.bn2(self.conv1(activated)))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return torch.add(shortcut, self.conv2(out))


class WideResNet(nn.Module):
    """Stem, three stages of blocks, norm and activation, global average, linear classifier.

    Args:
        depth: 6n+4 layers, n blocks a stage.
        channels: of the stem and the three stages.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"The value of `depth` is {depth}, but must be 6n+4")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.block1 = _stage(channels[0], channels[1], blocks, stride=1)
        self.block2 = _stage(channels[1], channels[2], blocks, stride=2)
        self.block3 = _stage(channels[2], channels[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(channels[3], num_classes)
        he_by_outputs(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = torch.relu(self.bn1(x))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    layer = nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
    return nn.Sequential(OrderedDict(layer=layer))
