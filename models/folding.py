"""A frozen network made faster: each batch norm that follows a convolution is folded into it."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .taps import INPUT, module_path, no_such_layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def frozen(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode and without gradients; its parameters are its own."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a frozen network with the very same parameters and buffers, for another thread to run."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def folded(model: nn.Module, image_shape: tuple[int, int, int], tapped: Sequence[str] = ()) -> nn.Module:
    """A frozen copy of a network that gives the same outputs by fewer operations.

    A convolution and a batch norm are one pair if, in a forward pass, each ran once and nothing else read what the
    convolution gave or their parameters; so any network's code will do. The folded batch norm is an `nn.Identity` at
    its old paths.

    Args:
        model: any network of images; left as it is.
        image_shape: (channels, height, width) of one image.
        tapped: module paths whose outputs will be read: a pair that one of them lies within stays as it is.

    Returns:
        The copy, as `frozen` makes it.

    Raises:
        InputError: a tapped path that the model does not have.
    """
    network = frozen(model)
    paths = {path for path, _ in network.named_modules(remove_duplicate=False)}
    if unknown := [module_path(path) for path in tapped if module_path(path) not in paths]:
        raise no_such_layer(model, unknown[0])
    identities: dict[nn.Module, nn.Module] = {}
    for convolution, norm in _pairs(network, image_shape, tapped):
        convolution.weight, convolution.bias = _fused(convolution, norm)
        identities[norm] = nn.Identity().eval()
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in identities:
                setattr(parent, name, identities[child])
    return network


def _fused(convolution: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The pair's weight and bias, computed in float64 and rounded once."""
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        _doubled(convolution.bias),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        _doubled(norm.weight),
        _doubled(norm.bias),
    )
    dtype = convolution.weight.dtype
    return nn.Parameter(weight.to(dtype), requires_grad=False), nn.Parameter(bias.to(dtype), requires_grad=False)


def _doubled(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _pairs(network: nn.Module, image_shape: tuple[int, int, int], tapped: Sequence[str]) -> list[tuple[Any, Any]]:
    """Each convolution and the batch norm that alone reads it."""
    convolutions = [module for module in network.modules() if _plain_convolution(module)]
    norms = [module for module in network.modules() if _plain_norm(module)]
    made_by: dict[int, nn.Module] = {}
    read_by: dict[nn.Module, nn.Module] = {}
    # Held, so that none of them gives its identity to a later tensor.
    kept: list[Tensor] = []
    seen: set[int] = set()

    def after_convolution(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept.append(output)
        made_by[id(output)] = module

    def before_norm(module: nn.Module, inputs: Any) -> None:
        if inputs and id(inputs[0]) in made_by:
            read_by[made_by[id(inputs[0])]] = module

    def see(output: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        kept.extend(outputs)
        seen.update(map(id, outputs))

    def after_tapped(_module: nn.Module, _inputs: Any, output: Any) -> None:
        see(output)

    def before_tapped(_module: nn.Module, inputs: Any, named: Any) -> None:
        see((inputs, named))

    handles = [
        network.get_submodule(module_path(path)).register_forward_pre_hook(before_tapped, with_kwargs=True)
        if path.endswith(INPUT)
        else network.get_submodule(path).register_forward_hook(after_tapped)
        for path in tapped
    ]
    handles += [module.register_forward_hook(after_convolution) for module in convolutions]
    handles += [module.register_forward_pre_hook(before_norm) for module in norms]
    uses = _Uses(made_by, {id(tensor) for module in (*convolutions, *norms) for tensor in _tensors(module)})
    first = next(network.parameters(), torch.zeros(()))
    image = torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad(), uses:
            see(network(image))
    finally:
        for handle in handles:
            handle.remove()
    return [
        (convolution, norm)
        for identity, convolution in made_by.items()
        if (norm := read_by.get(convolution)) is not None
        and uses.count[identity] == 1
        and identity not in seen
        # So both ran once, too.
        and all(uses.count[id(tensor)] <= 1 for module in (convolution, norm) for tensor in _tensors(module))
    ]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _plain_convolution(module: nn.Module) -> bool:
    """Whether its weight may be scaled: a subclass may standardise it, a parametrisation recompute it."""
    # Typed Any: `_conv_forward` is an attribute of convolutions only.
    own: Any = type(module)
    return (
        isinstance(module, _CONVOLUTIONS)
        and not _has_hooks(module)
        and any(
            own.forward is kind.forward and own._conv_forward is kind._conv_forward and "weight" in module._parameters
            for kind in _CONVOLUTIONS
        )
    )


def _plain_norm(module: nn.Module) -> bool:
    """Whether it does no more than a batch norm: a subclass may hold an activation."""
    kind = nn.modules.batchnorm._BatchNorm
    return (
        isinstance(module, kind)
        and not _has_hooks(module)
        and type(module).forward is kind.forward
        and module.running_mean is not None
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's code reads or changes what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read a convolution's output, or a parameter; to look at its shape is none."""

    def __init__(self, outputs: dict[int, nn.Module], parameters: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs, self._parameters = outputs, parameters
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {id(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        self.count.update(read & (self._outputs.keys() | self._parameters))
        return func(*args, **(kwargs or {}))
