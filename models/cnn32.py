"""The small convolutional networks of InDistill's CIFAR-10 experiment.

Sarridis et al. 2022, arXiv 2205.10003; the parameter names are those of the published code.
"""

import torch
from torch import Tensor, nn

_MAP = 2  # rows and columns that the last map of a 32×32 image has


class Cnn32(nn.Module):
    """Three times: 3×3 convolution without padding, norm, activation, max pooling; then two linear layers.

    The last map is averaged to 2×2, which changes nothing for images of 32×32 and lets others in.

    Args:
        channels: of the three convolutions.
        hidden: outputs of the first linear layer.
        num_classes: outputs.
        in_channels: image channels.
    """

    hint_layers = ("pool1", "pool2", "pool3")

    def __init__(self, channels: tuple[int, int, int], hidden: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(in_channels, first, 3)
        self.conv1_bn = nn.BatchNorm2d(first)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.conv2_bn = nn.BatchNorm2d(second)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(second, third, 3)
        self.conv3_bn = nn.BatchNorm2d(third)
        self.pool3 = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(_MAP)
        self.fc1 = nn.Linear(third * _MAP**2, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W], H and W at least 22 → logits [B, num_classes]."""
        x = self.pool1(torch.relu(self.conv1_bn(self.conv1(x))))
        x = self.pool2(torch.relu(self.conv2_bn(self.conv2(x))))
        x = self.pool3(torch.relu(self.conv3_bn(self.conv3(x))))
        x = torch.relu(self.fc1(self.average(x).flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
