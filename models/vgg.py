"""VGG networks with batch norm and one linear layer, for small images.

Simonyan and Zisserman 2015, arXiv 1409.1556; the layout and the parameter names are those of the public RepDistiller
checkpoints (Tian et al. 2020, arXiv 1910.10699).
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .initialisation import he_by_outputs, small_linear
from .pooling import GlobalAveragePool

# Smaller images are not halved between the last two stages.
_HALVED_FOUR_TIMES = 64


class Vgg(nn.Module):
    """Five stages of 3×3 convolutions with norm and activation, halved in between, global average, linear classifier.

    Between stages the maps are halved by max pooling: three times, and for images of at least 64 rows once more.

    Args:
        stages: the channels of each stage's convolutions.
        num_classes: outputs.
        in_channels: image channels.
    """

    def __init__(self, stages: Sequence[Sequence[int]], num_classes: int, in_channels: int) -> None:
        super().__init__()
        inputs = (in_channels, *(channels[-1] for channels in stages))
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _stage(channels, stage_inputs) for channels, stage_inputs in zip(stages, inputs, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.average = GlobalAveragePool()
        self.classifier = nn.Linear(stages[-1][-1], num_classes)
        he_by_outputs(self)
        small_linear(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W], H and W at least 8 → logits [B, num_classes]."""
        halved_again = x.shape[2] >= _HALVED_FOUR_TIMES
        x = self.pool(self.block0(x))
        x = self.pool(self.block1(x))
        x = self.block3(self.pool(self.block2(x)))
        x = self.block4(self.pool(x) if halved_again else x)
        logits: Tensor = self.classifier(self.average(x).flatten(1))
        return logits


def _stage(channels: Sequence[int], in_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_channels, *channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
