"""How the tensors of a network come about: each operation of one forward pass, and a way back along the main branch."""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import InputError, reason
from .feature_maps import first_tensor
from .folding import frozen
from .taps import nearest_paths, no_such_layer

# What `Step.maker` names.
_MAKERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
# Beside these and the pointwise operations, none is known to give each channel of one that it reads.
_KEEPING = re.compile(
    r"aten::(.*(pool|norm|upsample|dropout).*|pad|constant_pad_nd|prelu|_prelu_kernel|hardswish_?|log_sigmoid.*"
    r"|cat|mean|clone|contiguous|copy_|to|_to_copy|reshape|flatten|unflatten|_unsafe_view)"
)
_WEIGHTED = re.compile(r"aten::(.*conv.*|linear|.*mm|matmul|einsum|.*attention.*)")


@dataclass(frozen=True, eq=False)
class Step:
    """A tensor as one operation left it; one that is written over in place becomes another step.

    Attributes:
        operation: its name in torch, such as `aten::relu_`; empty for the image.
        shape: of the tensor.
        strides: of the tensor, in elements.
        storage: address of the memory.
        keeps: whether each channel comes of the same channel of what was read, if the sizes agree.
        view: whether it is memory of what was read, looked at in another way.
        maker: path of the innermost convolution, linear layer or batch norm that was running; None: none.
        reads: the steps it was made from; parameters and constants are none.
        depth: (weighted operations, their weights) on the longest way here from the image.
    """

    operation: str
    shape: torch.Size
    strides: tuple[int, ...]
    storage: int
    keeps: bool
    view: bool
    maker: str | None
    reads: tuple["Step", ...] = field(repr=False)
    depth: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Run:
    """The last run of a module.

    Attributes:
        read: the first tensor that went in, before the module could write over it; None: not made from the image.
        given: the tensor that came out, the first of several; None: as above.
        output: what came out.
    """

    read: Step | None
    given: Step | None
    output: Any


def last_runs(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Run]:
    """The last run of each module that runs in one forward pass of an image in evaluation.

    A copy of the network runs, so the given one is left as it is, and so is torch's random state.

    Args:
        model: any network of images.
        image_shape: (channels, height, width) of one image.

    Raises:
        InputError: the network cannot read such images.
    """
    network = frozen(model)
    like = next(network.parameters(), torch.empty(0))
    devices = [like.device] if like.is_cuda else []
    # In inference mode `linear` and the like are one operation each, not several.
    with ExitStack() as stack, torch.random.fork_rng(devices), torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        recorder = _Recorder(torch.rand(1, *image_shape, generator=generator).to(like.device, like.dtype))
        for path, module in network.named_modules():
            stack.enter_context(module.register_forward_pre_hook(recorder.before(path, module), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(recorder.after(path, module)))
        try:
            with recorder:
                network(recorder.image)
        except (AssertionError, RuntimeError, ValueError) as error:
            shape = "×".join(map(str, image_shape))
            raise InputError(
                f"{type(model).__name__} cannot read images of {shape} ({reason(error)}); change data or model"
            ) from error
    return recorder.runs


def run_of(model: nn.Module, path: str, runs: dict[str, Run]) -> Run:
    """The last run of one module.

    Raises:
        InputError: a path that the model does not have, or whose module did not run.
    """
    paths = [name for name, _ in model.named_modules()]
    if path not in paths or path == "":
        raise no_such_layer(model, path)
    if path not in runs:
        raise InputError(f"the layer {path!r} did not run in the forward pass; {nearest_paths(path, runs)}")
    return runs[path]


def main_branch(step: Step | None, dimension: int) -> Iterator[tuple[Step, int]]:
    """From a tensor back towards the image, as long as one tensor gives all its channels, each in its place.

    Where branches meet, the way goes on along the main one: of those added the one with most weighted operations behind
    it, so not along a shortcut, with most weights if there are as many; of factors that with fewest, so not along a
    gate. Which branch is defined, runs or is added first does not count.

    Args:
        step: where to begin.
        dimension: that of the channels in its shape.

    Yields:
        Each step, the first one too, with the dimension of the channels.
    """
    while step is not None:
        yield step, dimension
        step, dimension = _before(step, dimension)


def _before(step: Step, dimension: int) -> tuple[Step | None, int]:
    sources = [(read, found) for read in step.reads if (found := _dimension_in(read, step, dimension)) is not None]
    # A gate of one value for each channel has the channels too, but is no map.
    sources = [source for source in sources if source[0].shape == step.shape] or sources
    if not sources:
        return None, dimension
    choose = min if step.operation in ("aten::mul", "aten::mul_") else max
    return choose(sources, key=lambda source: source[0].depth)


def _dimension_in(read: Step, step: Step, dimension: int) -> int | None:
    """Where the channels of a step lie in one that it read; None if they are not all there, or not in their order."""
    size = step.shape[dimension]
    if step.view and read.storage == step.storage:
        looks = list(zip(read.shape, read.strides, strict=True))
        look = size, step.strides[dimension]
        return looks.index(look) if look in looks else None
    if not step.keeps:
        return None
    if len(read.shape) == len(step.shape):
        return dimension if read.shape[dimension] == size else None
    before = math.prod(step.shape[:dimension])
    return next(
        (d for d, length in enumerate(read.shape) if length == size and math.prod(read.shape[:d]) == before), None
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes a step of each tensor that comes of the image, and a run of each module."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image = image
        self.runs: dict[str, Run] = {}
        # Of modules that have not ended, the innermost last.
        self._reading: list[Step | None] = []
        self._makers: list[str] = []
        # Tensors are held, so that none gives its identity or memory to a later one.
        self._held: list[Tensor] = []
        self._steps: dict[int, Step] = {}
        self._record("", image, (), keeps=False, view=False, weights=None)

    def before(self, path: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._reading.append(self._step_of(next(iter(tree_leaves((inputs, named))), None)))
            if isinstance(module, _MAKERS):
                self._makers.append(path)

        return hook

    def after(self, path: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(module, _MAKERS):
                self._makers.pop()
            self.runs[path] = Run(self._reading.pop(), self._step_of(first_tensor(output)), output)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        reads = tuple(step for tensor in tensors if (step := self._step_of(tensor)) is not None)
        operation, mutates = func._schema.name, func._schema.is_mutable
        keeps = torch.Tag.pointwise in func.tags or _KEEPING.fullmatch(operation) is not None
        constants = sum(tensor.numel() for tensor in tensors if self._step_of(tensor) is None)
        weights = constants if _WEIGHTED.fullmatch(operation) else None
        for made in tree_leaves(output):
            # What gives back the very tensor it read, as dropout does in evaluation, has done nothing.
            unchanged = not mutates and any(made is tensor for tensor in tensors)
            if reads and isinstance(made, Tensor) and not unchanged:
                self._record(operation, made, reads, keeps=keeps, view=not mutates, weights=weights)
        return output

    def _record(
        self, operation: str, made: Tensor, reads: tuple[Step, ...], *, keeps: bool, view: bool, weights: int | None
    ) -> None:
        layers, weights_before = max((read.depth for read in reads), default=(0, 0))
        depth = (layers, weights_before) if weights is None else (layers + 1, weights_before + weights)
        maker = self._makers[-1] if self._makers else None
        storage = made.untyped_storage().data_ptr()
        self._held.append(made)
        self._steps[id(made)] = Step(operation, made.shape, made.stride(), storage, keeps, view, maker, reads, depth)

    def _step_of(self, tensor: Any) -> Step | None:
        return self._steps.get(id(tensor)) if isinstance(tensor, Tensor) else None
