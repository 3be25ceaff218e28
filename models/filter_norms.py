"""Which channels of a layer a pruned one would keep: those of its strongest filters.

Sarridis et al. 2022 (InDistill), arXiv 2205.10003.
"""

import torch
from torch import Tensor, nn

from .errors import InputError
from .feature_maps import feature_map, first_tensor, gives_channels_last
from .probing import last_runs, main_branch, run_of


def strongest_channels(model: nn.Module, path: str, image_shape: tuple[int, int, int], count: int) -> Tensor:
    """The channels of a layer whose filters have the largest L1 norm, by `filter_norms`.

    Of two that are equal the lower index is taken first.

    Args:
        model: any network of images; left as it is.
        path: module path of the layer.
        image_shape: (channels, height, width) of one image.
        count: channels to keep, 1..C.

    Returns:
        Indices int64 [count], ascending, on the CPU.

    Raises:
        InputError: as `filter_norms`, and a count that is not in 1..C.
    """
    norms = filter_norms(model, path, image_shape)
    if not 1 <= count <= len(norms):
        raise InputError(
            f"the count of channels to keep is {count}, but the layer {path!r} of {type(model).__name__} gives "
            f"{len(norms)}; choose 1..{len(norms)}"
        )
    return norms.sort(descending=True, stable=True).indices[:count].sort().values


def filter_norms(model: nn.Module, path: str, image_shape: tuple[int, int, int]) -> Tensor:
    """L1 norm of the filter behind each channel of the feature map that a layer gives.

    The filters are those of the last convolution or linear layer on the main branch up to the layer's output, inside
    the layer or before it (for a norm, an activation or a pooling): of a residual block the last convolution, not the
    shortcut's; of a transformer block the last linear layer. Norms, activations, pooling and gates in between leave
    each channel in its place. A layer that runs several times counts by its last run.

    Args:
        model: any network of images; left as it is.
        path: module path of the layer.
        image_shape: (channels, height, width) of one image.

    Returns:
        float64 [C], on the CPU.

    Raises:
        InputError: a path that the model does not have, a layer that does not run or gives no feature map, or whose
            channels are not those of one convolution, as where channels are concatenated or shuffled.
    """
    weight = model.get_submodule(_filters_path(model, path, image_shape)).weight
    assert isinstance(weight, Tensor)
    return weight.detach().to("cpu", torch.float64).abs().flatten(1).sum(1)


def _filters_path(model: nn.Module, path: str, image_shape: tuple[int, int, int]) -> str:
    """Path of the convolution or linear layer whose outputs are the layer's channels."""
    run = run_of(model, path, last_runs(model, image_shape))
    layer = model.get_submodule(path)
    channels_last = gives_channels_last(layer)
    channels = feature_map(run.output, path, channels_last).shape[1]
    output = first_tensor(run.output)
    assert output is not None
    # As `feature_map` reads them: tokens [B, T, D], else [B, C, ...].
    last = output.dim() == 3 or (output.dim() == 4 and channels_last)
    for step, dimension in main_branch(run.given, output.dim() - 1 if last else 1):
        maker = None if step.maker is None else model.get_submodule(step.maker)
        if isinstance(maker, nn.Conv2d | nn.Linear):
            made_in = 1 if isinstance(maker, nn.Conv2d) else len(step.shape) - 1
            if step.maker is not None and dimension == made_in:
                return step.maker
            break
    raise InputError(
        f"the layer {path!r} of {type(model).__name__} gives {channels} channels, but no convolution makes them all in "
        "this order, so InDistill cannot score them; choose another layer or network"
    )
