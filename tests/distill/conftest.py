from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hintsearch.distill.batches import Batch, DeviceImages
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.losses import HINT_LOSSES, HintLoss, TeacherLayer
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn

PlainNetwork = Callable[..., nn.Sequential]


@pytest.fixture(scope="session")
def splits() -> DataSplits:
    """Three classes that a small network tells apart, 60 training and 30 validation images of 1×8×8."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (3, 1, 8, 8))

    def draw(count: int) -> ImageSet:
        labels = np.arange(count, dtype=np.int64) % 3
        return ImageSet((patterns[labels] + rng.integers(0, 56, (count, 1, 8, 8))).astype(np.uint8), labels)

    return DataSplits(draw(60), draw(30), None, classes=3, mean=(0.5,), sd=(0.25,))


@pytest.fixture
def batches(splits: DataSplits) -> list[Batch]:
    """Eight batches of seven images, as the normalisers are measured on."""
    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    return data.fixed_batches(8, 7, seed=0)


@pytest.fixture
def teacher() -> nn.Module:
    """A residual network for `splits`, whose batch norms know the data and whose activations work in place."""
    with torch.random.fork_rng():
        torch.manual_seed(100)
        network = build_model(ModelSpec("resnet8", 3, 1, width=0.5)).train()
        with torch.no_grad():
            network(torch.randn(64, 1, 8, 8))
        return network


class Scales(HintLoss):
    """The mean of the teacher layer's own batch-norm scales, times the student's mean."""

    scales: Tensor

    def read_teacher(self, layer: TeacherLayer) -> None:
        read = layer.network.get_submodule(layer.path)
        norms = [module for module in read.modules() if isinstance(module, nn.BatchNorm2d)]
        self.register_buffer("scales", torch.stack([norm.weight.detach().mean() for norm in norms]))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.scales.mean() * student.mean()


@pytest.fixture
def scales_loss(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a hint loss that reads the teacher's parameters, registered for one test."""
    monkeypatch.setattr(HINT_LOSSES, "_entries", dict(HINT_LOSSES._entries))
    HINT_LOSSES.register("scales", source="this test")(Scales)
    return "scales"


@pytest.fixture
def plain_network() -> PlainNetwork:
    """Makes networks without batch norm: `conv1`, `relu1` in place, `conv2`, `relu2` in place, `fc`."""

    def make(channels: int = 4, seed: int = 0) -> nn.Sequential:
        layers: list[tuple[str, Callable[[], nn.Module]]] = [
            ("conv1", lambda: nn.Conv2d(1, channels, 3, padding=1)),
            ("relu1", lambda: nn.ReLU(inplace=True)),
            ("conv2", lambda: nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)),
            ("relu2", lambda: nn.ReLU(inplace=True)),
            ("pool", lambda: nn.AdaptiveAvgPool2d(1)),
            ("flat", nn.Flatten),
            ("fc", lambda: nn.Linear(2 * channels, 3)),
        ]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(OrderedDict((name, build()) for name, build in layers))

    return make
