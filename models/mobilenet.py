"""MobileNetV2 for small images.

Sandler et al. 2018, arXiv 1801.04381; strides, widths and parameter names are those of the public RepDistiller
checkpoints (Tian et al. 2020, arXiv 1910.10699), which follow Jin et al. 2019, arXiv 1904.09149.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .channel_counts import scaled
from .initialisation import he_by_outputs, small_linear
from .pooling import GlobalAveragePool


@dataclass(frozen=True)
class _Stage:
    expansion: int
    channels: int
    blocks: int
    stride: int


_STEM = 32
_STAGES = (
    _Stage(expansion=1, channels=16, blocks=1, stride=1),
    _Stage(expansion=6, channels=24, blocks=2, stride=1),
    _Stage(expansion=6, channels=32, blocks=3, stride=2),
    _Stage(expansion=6, channels=64, blocks=4, stride=2),
    _Stage(expansion=6, channels=96, blocks=3, stride=1),
    _Stage(expansion=6, channels=160, blocks=3, stride=2),
    _Stage(expansion=6, channels=320, blocks=1, stride=1),
)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise convolution, 1×1 projection; [B, in, H, W] → [B, out, H/stride, W/stride].

    A shortcut where the size does not change. Nothing follows the projection's norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H/stride, W/stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """Stem with stride 2, seven stages of inverted residuals, 1×1 convolution, global average, linear classifier.

    Args:
        width: factor on the channel counts of stem and stages.
        head_channels: of the last convolution.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(self, width: float, head_channels: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = scaled(_STEM, width)
        self.conv1 = _unit(in_channels, channels, kernel=3, stride=2)
        self.blocks = nn.Sequential()
        for stage in _STAGES:
            out_channels = scaled(stage.channels, width)
            self.blocks.append(_blocks(stage, channels, out_channels))
            channels = out_channels
        self.conv2 = _unit(channels, head_channels, kernel=1, stride=1)
        self.avgpool = GlobalAveragePool()
        linear = nn.Linear(head_channels, num_classes)
        self.classifier = nn.Sequential(linear)
        he_by_outputs(self)
        small_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = self.conv2(self.blocks(self.conv1(x)))
        logits: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return logits


def _unit(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _blocks(stage: _Stage, in_channels: int, out_channels: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, stage.stride, stage.expansion)
    further = (InvertedResidual(out_channels, out_channels, 1, stage.expansion) for _ in range(stage.blocks - 1))
    return nn.Sequential(first, *further)
