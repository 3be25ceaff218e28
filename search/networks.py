"""A network with its weights, as it travels between processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ..distill.trainer import TeacherNetwork
from ..models.weights import StateDict, apply_weights
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
        apply_weights(network, as_tensors(self.weights), self.spec.name)
        return network

    def as_teacher(self) -> TeacherNetwork:
        """The network with its weights, as a trainer takes it."""
        return TeacherNetwork(self.build(), self.spec.preprocessing)


def as_arrays(weights: StateDict) -> dict[str, NDArray[Any]]:
    """A state dict as arrays, which Ray's object store shares without copies."""
    return {name: tensor.cpu().numpy() for name, tensor in weights.items()}


def as_tensors(weights: Mapping[str, NDArray[Any]]) -> StateDict:
    """The inverse of `as_arrays`; copies, for arrays in the object store are read-only."""
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
