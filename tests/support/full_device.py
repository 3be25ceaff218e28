"""Networks on a device that has room for some images only: beyond, the allocator is really asked for too much."""

import json
from pathlib import Path

from hintsearch.models.zoo import ModelSpec

_NETWORKS = """
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

ROOM = Path(__file__).with_name("room.json")
# Of the states in which a network runs, whether it is one.
STATES = {
    "gradients": lambda module: module.training and torch.is_grad_enabled(),
    "training": lambda module: module.training,
    "evaluation": lambda module: not module.training,
}


class Memory(nn.Module):
    def forward(self, features):
        if ROOM.exists():
            room = json.loads(ROOM.read_text())
            if STATES[room["state"]](self):
                room["after"] -= 1
                ROOM.write_text(json.dumps(room))
                if room["after"] < 0 and len(features) > room["images"]:
                    torch.empty(2**60, dtype=torch.uint8)
        return features


def network(num_classes, in_channels, norm=False, drop=False):
    def block(number, channels, width, stride):
        return {
            f"conv{number}": nn.Conv2d(channels, width, 3, padding=1, stride=stride),
            f"norm{number}": nn.BatchNorm2d(width) if norm else nn.Identity(),
            f"relu{number}": nn.ReLU(),
            f"drop{number}": nn.Dropout(0.5) if drop else nn.Identity(),
        }

    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(8, num_classes)}
    layers = {**block(1, in_channels, 4, 1), "memory": Memory(), **block(2, 4, 8, 2), **head}
    return nn.Sequential(OrderedDict(layers))


def plain(num_classes, in_channels):
    return network(num_classes, in_channels)


def normed(num_classes, in_channels):
    return network(num_classes, in_channels, norm=True)


def dropping(num_classes, in_channels):
    return network(num_classes, in_channels, drop=True)
"""


class FullDevice:
    """A device whose networks are own code: `conv1`, `norm1`, `relu1`, `memory`, the same of 2, `pool`, `flat`, `fc`.

    The allocation that fails is behind the first block, so that its batch norm has already changed.

    Args:
        folder: where the networks' code goes, and how much room there is.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._networks, self._room = folder / "networks.py", folder / "room.json"
        self._networks.write_text(_NETWORKS)

    def network(self, kind: str) -> ModelSpec:
        """`plain`, `normed` with batch norm, or `dropping` with dropout; for images of one channel in three classes."""
        return ModelSpec(f"{self._networks}:{kind}", 3, 1)

    def holds(self, images: int, state: str = "gradients", after: int = 0) -> None:
        """From now on, or after so many passes, it has room for so many images at once.

        In passes of that state: `gradients`, `training` or `evaluation`.
        """
        self._room.write_text(json.dumps({"images": images, "state": state, "after": after}))

    def is_free(self) -> None:
        """From now on it has room for all."""
        self._room.unlink()
