"""Which layers of a network may become hint points, and what they look like."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, reason
from .taps import LayerTaps


@dataclass(frozen=True)
class Candidate:
    """A layer that may become a hint point.

    Attributes:
        path: module path.
        index: 1-based depth among the candidates, in the order of execution.
        channels: C of the output [B, C, H, W].
        height: H of the output for the study's image size.
        width: W of the output.
        multiply_adds: of one image, from the input up to and including this layer.
    """

    path: str
    index: int
    channels: int
    height: int
    width: int
    multiply_adds: int


def list_candidates(
    model: nn.Module, image_shape: tuple[int, int, int], paths: Sequence[str] | None = None
) -> tuple[Candidate, ...]:
    """Lists the candidates of a network in the order in which they run.

    Args:
        model: any network of images; its mode and buffers are left as they are.
        image_shape: (channels, height, width) of one image.
        paths: module paths to use instead of the outputs of the repeated blocks.

    Raises:
        InputError: an unknown path, a layer that is no feature map, or a network without repeated blocks.
    """
    chosen = tuple(paths) if paths else repeated_blocks(model)
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no repeated blocks; list its layers in the study "
            "(layers.candidates for a teacher, student.candidates for a student)"
        )
    shapes, costs = _trace(model, image_shape, chosen)
    return tuple(
        Candidate(path, index, shape[1], shape[2], shape[3], costs[path])
        for index, (path, shape) in enumerate(shapes.items(), start=1)
    )


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost blocks: composed children of Sequential or ModuleList whose class occurs twice or more."""
    children = [
        (f"{path}.{name}" if path else name, child)
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for name, child in module.named_children()
        if any(True for _ in child.children()) and not isinstance(child, nn.Sequential | nn.ModuleList)
    ]
    occurrences = Counter(type(child) for _, child in children)
    blocks: list[str] = []
    for path, child in children:
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if occurrences[type(child)] >= 2 and not inside:
            blocks.append(path)
    return tuple(blocks)


def stage_ends(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The last candidate of each stage; a stage is a run of candidates of one size [C, H, W]."""
    following = [*candidates[1:], None]
    return tuple(
        candidate
        for candidate, after in zip(candidates, following, strict=True)
        if after is None or _size(after) != _size(candidate)
    )


def _size(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.channels, candidate.height, candidate.width


def _trace(
    model: nn.Module, image_shape: tuple[int, int, int], paths: tuple[str, ...]
) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """Shapes and cumulated multiply-adds of `paths` in the order of execution, from one forward pass of zeros."""
    spent = 0
    shapes: dict[str, torch.Size] = {}
    costs: dict[str, int] = {}

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal spent
        spent += _multiply_adds(module, output)

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise InputError(f"the layer {path!r} gives no feature map [B, C, H, W]; choose a convolutional layer")
            shapes[path], costs[path] = output.shape, spent

        return hook

    with LayerTaps(model, paths) as taps:
        modules = dict(model.named_modules())
        handles = [m.register_forward_hook(count) for m in modules.values() if isinstance(m, nn.Conv2d | nn.Linear)]
        handles += [modules[path].register_forward_hook(note(path)) for path in paths]
        modes = {module: module.training for module in modules.values()}
        model.eval()
        try:
            with torch.no_grad():
                parameter = next(model.parameters())
                _run_on_zeros(model, image_shape, parameter)
            taps.take()
        finally:
            for module, training in modes.items():
                module.training = training
            for handle in handles:
                handle.remove()
    return shapes, costs


def _run_on_zeros(model: nn.Module, image_shape: tuple[int, int, int], parameter: Tensor) -> None:
    try:
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        shape = "×".join(map(str, image_shape))
        raise InputError(
            f"{type(model).__name__} cannot read images of {shape} ({reason(error)}); change data or model"
        ) from error


def _multiply_adds(module: nn.Module, output: Tensor) -> int:
    """Of one image: each output value of a convolution or linear layer costs its filter's length."""
    values = output[0].numel()
    if isinstance(module, nn.Conv2d):
        rows, columns = module.kernel_size
        return values * rows * columns * module.in_channels // module.groups
    if isinstance(module, nn.Linear):
        return values * module.in_features
    return 0
