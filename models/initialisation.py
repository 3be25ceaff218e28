"""How networks start."""

from torch import nn


def he_by_outputs(model: nn.Module) -> None:
    """Draws the weights of every convolution from N(0, 2 / (kernel area × output channels)) and zeroes its biases.

    He et al. 2015, arXiv 1502.01852, with the number of outputs; the groups of a convolution do not count.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_linear(layer: nn.Linear) -> None:
    """Draws the weights from N(0, 0.01²) and zeroes the biases."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
