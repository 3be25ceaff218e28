"""ShuffleNets for small images.

Zhang et al. 2018, arXiv 1707.01083 (v1), and Ma et al. 2018, arXiv 1807.11164 (v2); the stem, a 1×1 convolution without
stride, and the parameter names are those of the public RepDistiller checkpoints (Tian et al. 2020, arXiv 1910.10699).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .channel_counts import scaled
from .pooling import GlobalAveragePool

_STEM = 24
_V1_GROUPS = 3
# A unit's inner convolution has a fourth of its channels, and these come in groups.
_V1_MULTIPLE = 4 * _V1_GROUPS


class ChannelShuffle(nn.Module):
    """Deals the channels of `groups` groups in turn; [B, C, H, W] → [B, C, H, W]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], C a multiple of the groups."""
        batch, channels, height, width = x.shape
        grouped = x.view(batch, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """Unit of v1: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; [B, in, H, W] → [B, out, H/stride, W/stride].

    With stride 2 the averaged input is appended to the channels, else the input is added.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, in_groups: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride == 2 else out_channels
        inner = made // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=in_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.shuffle = ChannelShuffle(in_groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, made, 1, groups=_V1_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.average = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        # A module, so that hint losses can read what it is given.
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H/stride, W/stride], after the last activation."""
        out = self.shuffle(torch.relu(self.bn1(self.conv1(x))))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        activated: Tensor = self.relu(out + x if self.average is None else torch.cat([out, self.average(x)], 1))
        return activated


class ShuffleNetV1(nn.Module):
    """Stem, three stages of units that each begin with stride 2, global average, linear classifier; three groups.

    Args:
        channels: of the three stages.
        blocks: units of each stage.
        width: factor on every channel count; they become multiples of 12, each larger than the one before.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], width: float, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        counts = _growing(_STEM, *channels, width=width)
        self.conv1 = nn.Conv2d(in_channels, counts[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(counts[0])
        self.layer1 = _v1_stage(counts[0], counts[1], blocks[0], in_groups=1)
        self.layer2 = _v1_stage(counts[1], counts[2], blocks[1], in_groups=_V1_GROUPS)
        self.layer3 = _v1_stage(counts[2], counts[3], blocks[2], in_groups=_V1_GROUPS)
        self.avgpool = GlobalAveragePool()
        self.linear = nn.Linear(counts[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


class SplitUnit(nn.Module):
    """Unit of v2: the second half of the channels goes through 1×1, depthwise 3×3, 1×1; [B, C, H, W] → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], C even."""
        kept, out = x.chunk(2, dim=1)
        out = torch.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = torch.relu(self.bn3(self.conv3(out)))
        shuffled: Tensor = self.shuffle(torch.cat([kept, out], 1))
        return shuffled


class DownUnit(nn.Module):
    """Unit of v2 that halves the map, in two branches of half the outputs; [B, in, H, W] → [B, out, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H/2, W/2]."""
        left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = torch.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = torch.relu(self.bn5(self.conv5(right)))
        shuffled: Tensor = self.shuffle(torch.cat([left, right], 1))
        return shuffled


class ShuffleNetV2(nn.Module):
    """Stem, three stages of a down unit and split units, 1×1 convolution, global average, linear classifier.

    Args:
        channels: of the three stages and the last convolution.
        blocks: split units of each stage.
        width: factor on every channel count; those of the stages become even.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], width: float, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        stem, head = scaled(_STEM, width), scaled(channels[3], width)
        first, second, third = (scaled(count, width, multiple=2) for count in channels[:3])
        self.conv1 = nn.Conv2d(in_channels, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _v2_stage(stem, first, blocks[0])
        self.layer2 = _v2_stage(first, second, blocks[1])
        self.layer3 = _v2_stage(second, third, blocks[2])
        self.conv2 = nn.Conv2d(third, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.avgpool = GlobalAveragePool()
        self.linear = nn.Linear(head, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


def _growing(*counts: int, width: float) -> list[int]:
    """Scaled counts, each at least one multiple above the last, for a unit with stride 2 appends its input."""
    grown: list[int] = []
    for count in counts:
        least = grown[-1] + _V1_MULTIPLE if grown else 0
        grown.append(max(least, scaled(count, width, _V1_MULTIPLE)))
    return grown


def _v1_stage(in_channels: int, out_channels: int, blocks: int, in_groups: int) -> nn.Sequential:
    first = GroupedUnit(in_channels, out_channels, 2, in_groups)
    further = (GroupedUnit(out_channels, out_channels, 1, _V1_GROUPS) for _ in range(blocks - 1))
    return nn.Sequential(first, *further)


def _v2_stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(SplitUnit(out_channels) for _ in range(blocks)))
