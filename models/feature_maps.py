"""What a layer gives, read as a feature map [B, C, H, W]."""

from math import isqrt
from typing import Any

from torch import Tensor, nn

from .errors import InputError

# Where the classes are defined whose four-dimensional outputs are all [B, H, W, C]: the Swin transformers.
_CHANNELS_LAST = (
    "torchvision.models.swin_transformer",
    "timm.models.swin_transformer",
    "timm.models.swin_transformer_v2",
)


def gives_channels_last(module: nn.Module) -> bool:
    """Whether a layer is known to give [B, H, W, C]: a Swin transformer's, or a Sequential that ends with one.

    Nothing is guessed from shapes: a map may have as many rows as channels.
    """
    if type(module) is nn.Sequential and len(module):
        return gives_channels_last(module[-1])
    return type(module).__module__ in _CHANNELS_LAST


def feature_map(output: Any, path: str, channels_last: bool = False) -> Tensor:
    """Reads what a layer gives as a feature map [B, C, H, W]; where no value has to be moved, as a view.

    | what the layer gives | feature map |
    |---|---|
    | [B, C, H, W] | as it is; that the channels come second is taken on trust |
    | [B, H, W, C] with `channels_last` | [B, C, H, W] |
    | tokens [B, T, D], T = s², s ≥ 2 | [B, D, s, s], row by row |
    | tokens [B, T, D], T = s² + 1, s ≥ 2 | the same without the first token, the class token |
    | tokens [B, T, D], any other T | [B, D, T, 1] |
    | [B, C] | [B, C, 1, 1] |
    | a tuple or list that begins with a tensor | that tensor, by the rules above |

    One and two tokens are too few to tell a grid and a class token from a sequence, so they stay a sequence.

    Args:
        output: what the layer gives.
        path: of the layer, for the error.
        channels_last: four dimensions are [B, H, W, C], see `gives_channels_last`.

    Raises:
        InputError: anything else.
    """
    tensor = first_tensor(output)
    if tensor is None or tensor.dim() not in (2, 3, 4):
        raise InputError(
            f"the layer {path!r} gives {_described(output)}, but a feature map is [B, C, H, W], tokens [B, T, D] "
            "or [B, C]; choose another layer"
        )
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() == 3:
        return _map_of_tokens(tensor)
    return tensor.movedim(3, 1) if channels_last else tensor


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a layer gives, or with which the tuple or list begins that it gives; None: there is none."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _map_of_tokens(tokens: Tensor) -> Tensor:
    count = tokens.shape[1]
    side = isqrt(count)
    if side >= 2 and count == side * side + 1:
        tokens, count = tokens[:, 1:], count - 1
    size = (side, side) if side >= 2 and count == side * side else (count, 1)
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    if isinstance(output, tuple | list):
        inside = f"begins with {_described(output[0])}" if output else "is empty"
        return f"a {type(output).__name__} that {inside}"
    return f"a {type(output).__name__}"
