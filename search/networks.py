"""A network with its weights, as it travels between processes."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ..models.weights import apply_weights
from ..models.zoo import ModelSpec, build_model


@dataclass(frozen=True)
class TrainedNetwork:
    """What another process needs to build a network.

    Attributes:
        spec: how to build it.
        weights: its state dict as arrays, which Ray's object store shares without copies.
    """

    spec: ModelSpec
    weights: dict[str, NDArray[Any]]

    def build(self) -> nn.Module:
        """The network with its weights."""
        network = build_model(self.spec)
        # A copy: the arrays in the object store are read-only, and batch norm's counters would be written to.
        weights = {name: torch.from_numpy(array.copy()) for name, array in self.weights.items()}
        apply_weights(network, weights, self.spec.name)
        return network
