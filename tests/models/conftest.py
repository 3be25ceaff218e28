import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

OWN_FACTORY = """
from torch import nn


def build_net(*, num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def build_nothing(*, num_classes, in_channels):
    return {"classes": num_classes}
"""


@pytest.fixture
def small_network() -> nn.Sequential:
    """`conv` → `relu` in place → `pool`, seeded; 2 channels in, 3 out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("conv", nn.Conv2d(2, 3, 3, padding=1))
        network.add_module("relu", nn.ReLU(inplace=True))
        network.add_module("pool", nn.MaxPool2d(2))
        return network


@pytest.fixture
def own_factory(tmp_path: Path) -> Path:
    """A user's file with the factory `build_net`, and `build_nothing` which returns no network."""
    path = tmp_path / "my_models.py"
    path.write_text(OWN_FACTORY)
    return path


@pytest.fixture
def own_module(own_factory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same file as an importable module."""
    monkeypatch.syspath_prepend(own_factory.parent)
    yield own_factory.stem
    sys.modules.pop(own_factory.stem, None)


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], Path]:
    """Writes a file of that name; for tests that write many times, which `tmp_path` is not for."""
    folder = tmp_path_factory.mktemp("scratch")

    def write(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write
