"""What a layer's features are before its last activation, and the batch norm that gives them their distribution.

Heo et al. 2019 (AB), arXiv 1811.03233, and Heo et al. 2019 (OFD), arXiv 1904.01866.
"""

from torch import nn

from .probing import last_runs, main_branch, run_of

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)


def end_activation(model: nn.Module, path: str, image_shape: tuple[int, int, int]) -> str | None:
    """Path of the activation module whose output is what a layer gives.

    The input of this module's last run is then the layer's output before the activation. An activation that works in
    place writes over it.

    Args:
        model: any network of images; left as it is.
        path: module path of the layer; an activation's own will do.
        image_shape: (channels, height, width) of one image.

    Returns:
        None where no activation module makes the output in its last run: something follows it (pooling, a sum), the
        activation is a function (`torch.relu`), or one module serves as several activations and a later one is its
        last run.

    Raises:
        InputError: a path that the model does not have, or a layer that does not run.
    """
    runs = last_runs(model, image_shape)
    given = run_of(model, path, runs).given
    ends = [
        name
        for name, run in runs.items()
        if given is not None and run.given is given and isinstance(model.get_submodule(name), _ACTIVATIONS)
    ]
    return ends[-1] if ends else None


def preceding_batch_norm(
    model: nn.Module, activation_path: str, image_shape: tuple[int, int, int]
) -> nn.BatchNorm2d | None:
    """The batch norm that made what an activation module reads in its last run.

    It is the last one on the main branch: of a residual block that of the last convolution, not the shortcut's.

    Args:
        model: any network of images; left as it is.
        activation_path: of the module, as `end_activation` gives it.
        image_shape: (channels, height, width) of one image.

    Returns:
        The model's own module; None where there is none after the last convolution, linear layer or concatenation.

    Raises:
        InputError: a path that the model does not have, or a module that does not run.
    """
    read = run_of(model, activation_path, last_runs(model, image_shape)).read
    if read is None or len(read.shape) != 4:
        return None
    for step, _dimension in main_branch(read, 1):
        if step.maker is not None:
            maker = model.get_submodule(step.maker)
            return maker if isinstance(maker, nn.BatchNorm2d) else None
    return None
