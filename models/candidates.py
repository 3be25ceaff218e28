"""Which layers of a network may become hint points, and what they look like."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError, reason
from .feature_maps import first_tensor, gives_channels_last
from .taps import INPUT, LayerTaps, module_path, no_such_layer

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Candidate:
    """A layer that may become a hint point.

    Attributes:
        path: module path.
        index: 1-based depth among the candidates, in the order of execution.
        channels: C of the feature map [B, C, H, W] that `feature_map` makes of the output; D of tokens.
        height: H of the feature map for the study's image size.
        width: W of the feature map.
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

    By default they are the layers that the network names itself in an attribute `hint_layers`, a tuple of paths. If it
    has none, they are the repeated blocks, in the first order of preference (see `repeated_blocks`) that has any which
    run in evaluation and give more than a vector: auxiliary classifiers and blocks of a classifier are none. Blocks
    that give [B, H, W, C] are refused, unless `gives_channels_last` knows them, as it does Swin's; for `paths`,
    [B, C, H, W] is taken on trust.

    `paths` may hold patterns. A pattern stands for every module path with as many segments (the parts between dots)
    whose segments match its own by the rules of `fnmatch`, case counting: `layer*.?` matches `layer1.0`, but neither
    `layer1` nor `layer1.0.conv1`. A path matches itself; `fc:input` stands for what the module `fc` is given. Every
    module that is matched, by a pattern too, has to run and to give a feature map: none is left out in silence. A
    module that runs several times counts by its last run.

    Multiply-adds are those of convolutions and matrix products, attention's too, as torch's flop counter has them.

    Args:
        model: any network of images; its mode and buffers are left as they are.
        image_shape: (channels, height, width) of one image.
        paths: module paths and patterns of them to use instead of the default; the order and repetitions do not count.

    Raises:
        InputError: a path or pattern that no module matches, a layer that does not run, gives no feature map or is
            written over by the network, a network without repeated blocks, or whose blocks have their channels last.
    """
    with _evaluation(model):
        paths = paths or getattr(model, "hint_layers", ())
        chosen = _matching(model, paths) if paths else _default_paths(model, image_shape)
        if not chosen:
            raise InputError(
                f"{type(model).__name__} has no repeated blocks; list its layers in the study "
                "(layers.candidates for a teacher, student.candidates for a student)"
            )
        traced = _trace(model, image_shape, chosen)
    return tuple(
        Candidate(path, index, shape[1], shape[2], shape[3], multiply_adds)
        for index, (path, (shape, multiply_adds)) in enumerate(traced.items(), start=1)
    )


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the network's repeated blocks, in the order of registration; empty if it has none.

    The first that a network has, in this order of preference:

    1. blocks in a Sequential or ModuleList: modules with children of their own, of a class of which there are at
       least two. A block has at least two weights of two or more dimensions, that is two convolutions or linear
       layers; so neither a convolution with its norm nor the layer between two stages is one.
    2. such blocks anywhere.
    3. as 1, then as 2, with one such weight.
    4. convolution units of a Sequential: a convolution, then norms and activations, up to anything else; the path is
       that of the unit's last module. There must be two. A convolution that no convolution or linear layer follows
       makes the logits, and is none.

    A block inside another is none, and a Sequential with its own `forward` (a residual, say) is a block, not a
    container. Only the structure is read, so the list may hold blocks that `list_candidates` leaves out.
    """
    return next(_preferences(model), ())


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


def _matching(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    paths = [path for path, _ in model.named_modules() if path]
    chosen: list[str] = []
    for pattern in patterns:
        matched = [path for path in paths if _matches(path, module_path(pattern))]
        if not matched:
            raise no_such_layer(model, module_path(pattern))
        chosen += [f"{path}{INPUT}" for path in matched] if pattern.endswith(INPUT) else matched
    return tuple(dict.fromkeys(chosen))


def _matches(path: str, pattern: str) -> bool:
    names, wanted = path.split("."), pattern.split(".")
    same_depth = len(names) == len(wanted)
    return path == pattern or (same_depth and all(fnmatchcase(*pair) for pair in zip(names, wanted, strict=True)))


def _default_paths(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    for blocks in _preferences(model):
        shapes = _output_shapes(model, image_shape, blocks)
        maps = tuple(path for path, shape in shapes.items() if len(shape) != 2)
        for path in maps:
            if _seems_channels_last(model.get_submodule(path), shapes[path]):
                raise InputError(
                    f"the block {path!r} gives {list(shapes[path])}, which seems to have its channels last; list "
                    "layers that give [B, C, H, W] in the study (layers.candidates, student.candidates)"
                )
        if maps:
            return maps
    return ()


def _preferences(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """What may be taken for the network's blocks, the best first; none is empty."""
    composed = {
        path: module
        for path, module in model.named_modules()
        if path and any(True for _ in module.children()) and not _is_container(module)
    }
    contained = {path: module for path, module in composed.items() if _is_container(_parent(model, path))}
    for weights in (2, 1):
        for modules in (contained, composed):
            if blocks := _outermost_repeated(modules, weights):
                yield blocks
    if units := _convolution_units(model):
        yield units


def _is_container(module: nn.Module) -> bool:
    own_forward = isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward
    return isinstance(module, _CONTAINERS) and not own_forward


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _outermost_repeated(modules: Mapping[str, nn.Module], weights: int) -> tuple[str, ...]:
    """Those whose class occurs twice and has, in one of its instances, that many weights; parents come first."""
    occurrences = Counter(type(module) for module in modules.values())
    wide_enough = {type(module) for module in modules.values() if _weights(module) >= weights}
    blocks: list[str] = []
    for path, module in modules.items():
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if occurrences[type(module)] >= 2 and type(module) in wide_enough and not inside:
            blocks.append(path)
    return tuple(blocks)


def _weights(module: nn.Module) -> int:
    """Parameters of two or more dimensions: those of norms, and biases, have one."""
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _convolution_units(model: nn.Module) -> tuple[str, ...]:
    """Last modules of the units [convolution, norm, activation] in each Sequential."""
    weighted = [module for module in model.modules() if isinstance(module, (*_CONVOLUTIONS, nn.Linear))]
    units: list[str] = []
    for path, chain in model.named_modules():
        if not isinstance(chain, nn.Sequential):
            continue
        occurrences = Counter(chain)
        in_unit = False
        for name, module in chain.named_children():
            # An activation that the chain runs twice would stand for its last run only.
            continues = in_unit and _norm_or_activation(module) and occurrences[module] == 1
            starts = isinstance(module, _CONVOLUTIONS) and module is not weighted[-1]
            if continues:
                units.pop()
            if continues or starts:
                units.append(f"{path}.{name}" if path else name)
            in_unit = continues or starts
    return tuple(units) if len(units) >= 2 else ()


def _norm_or_activation(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__module__ == nn.modules.activation.__name__


def _seems_channels_last(block: nn.Module, shape: torch.Size) -> bool:
    """Whether an output seems to be [B, H, W, C]: the last linear layer makes its fourth dimension, not its second."""
    if gives_channels_last(block):
        return False
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return len(shape) == 4 and bool(linear) and shape[1] != linear[-1].out_features == shape[3]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is given back."""
    modes = {module: module.training for module in model.modules()}
    # Torch's flop counter fails where a module is given a view of a parameter that wants gradients, say a class token.
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    # The fast path of transformer layers is one operation, in which torch's counter sees no multiply-adds.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def _output_shapes(model: nn.Module, image_shape: tuple[int, int, int], paths: Sequence[str]) -> dict[str, torch.Size]:
    """Shapes of what the modules that run give, as it is; of zero dimensions where it is no tensor."""
    shapes: dict[str, torch.Size] = {}

    def note(path: str, output: Any) -> None:
        tensor = first_tensor(output)
        shapes[path] = torch.Size() if tensor is None else tensor.shape

    with _watching(model, paths, note):
        _run_on_zeros(model, image_shape)
    return shapes


def _trace(
    model: nn.Module, image_shape: tuple[int, int, int], paths: Sequence[str]
) -> dict[str, tuple[torch.Size, int]]:
    """Shape of the feature map and cumulated multiply-adds of each path, in the order of the last runs."""
    spent: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def note(path: str, _output: Any) -> None:
        # Taken out first, so that a module which runs again moves to the end.
        spent.pop(path, None)
        spent[path] = counter.get_total_flops() // 2

    with LayerTaps(model, paths) as taps, _watching(model, paths, note):
        # As plain products of matrices: which of torch's fused attentions the counter knows differs between releases.
        with counter, sdpa_kernel(SDPBackend.MATH):
            _run_on_zeros(model, image_shape)
        shapes = {path: feature.shape for path, feature in zip(paths, taps.take(), strict=True)}
    for path, shape in shapes.items():
        if shape[0] != 1:
            raise InputError(
                f"the layer {path!r} gives the feature map {list(shape)} for one image, but a feature map is "
                "[B, C, H, W] and tokens are [B, T, D]; choose another layer, or put the batch first"
            )
    return {path: (shapes[path], multiply_adds) for path, multiply_adds in spent.items()}


@contextmanager
def _watching(model: nn.Module, paths: Sequence[str], note: Callable[[str, Any], None]) -> Iterator[None]:
    """Calls `note` with (path, output) whenever one of the modules has run."""

    def hook_of(path: str) -> Any:
        return lambda _module, _inputs, output: note(path, output)

    with ExitStack() as handles:
        for path in paths:
            handles.enter_context(model.get_submodule(module_path(path)).register_forward_hook(hook_of(path)))
        yield


def _run_on_zeros(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    like = next(model.parameters(), torch.empty(0))
    try:
        model(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = "×".join(map(str, image_shape))
        raise InputError(
            f"{type(model).__name__} cannot read images of {shape} ({reason(error)}); change data or model"
        ) from error
