"""Residual networks for small images.

He et al. 2016, arXiv 1512.03385, section 4.2 (depth 6n+2, three stages); the x4 variants and the parameter names are
those of the public RepDistiller checkpoints (Tian et al. 2020, arXiv 1910.10699).
"""

from torch import Tensor, nn

from .initialisation import he_by_outputs
from .pooling import GlobalAveragePool


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut; [B, in, H, W] → [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H/stride, W/stride], after the last activation."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: Tensor = self.relu(out + shortcut)
        return activated


class CifarResNet(nn.Module):
    """Stem, three stages of basic blocks, global average, linear classifier.

    Args:
        depth: 6n+2 layers, n blocks a stage.
        channels: of the stem and the three stages.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"The value of `depth` is {depth}, but must be 6n+2")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(channels[0], channels[1], blocks, stride=1)
        self.layer2 = _stage(channels[1], channels[2], blocks, stride=2)
        self.layer3 = _stage(channels[2], channels[3], blocks, stride=2)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(channels[3], num_classes)
        he_by_outputs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
