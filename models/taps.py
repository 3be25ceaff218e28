"""Reading inner layers of a network by module path, without touching the network's code."""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InputError, nearest
from .feature_maps import feature_map, gives_channels_last

T = TypeVar("T")

# A path that ends so stands for what the module is given, not for what it gives.
INPUT = ":input"


def module_path(path: str) -> str:
    """The path of the module that a tap is on: `fc` of `fc`, and of `fc:input`."""
    return path.removesuffix(INPUT)


class LayerTaps(Generic[T]):
    """Captures the feature maps [B, C, H, W] of named modules at each forward pass, or what a reader makes of them.

    Each output becomes a feature map by `feature_map`. A module that runs several times in a pass counts by its last
    run. The path `fc:input` stands for the first argument of the module `fc`, in the place of its output. Used as a
    context manager, or closed by `close`.

    Without `read` the feature maps themselves are kept, with their gradient history if the network runs with gradients.
    An in-place activation that would write over one of them works out of place while the taps are on.

    With `read` only its results are kept: it is called as soon as the module has run, before a later one can write
    over the feature map, and in-place activations stay as they are. So a reader must not return the feature map or a
    view of it, and should detach what it returns unless it wants gradients.

    Attributes:
        paths: what is read, in the order of `take`.

    Args:
        model: the network.
        paths: module paths as `named_modules` gives them, such as `layer1.0`.
        read: makes of (path, feature map) what is kept instead.

    Raises:
        InputError: a path that the model does not have; names the nearest. In a forward pass: an output that is no
            feature map.
    """

    @overload
    def __init__(self: "LayerTaps[Tensor]", model: nn.Module, paths: Sequence[str], read: None = None) -> None: ...

    @overload
    def __init__(self, model: nn.Module, paths: Sequence[str], read: Callable[[str, Tensor], T]) -> None: ...

    def __init__(
        self, model: nn.Module, paths: Sequence[str], read: Callable[[str, Tensor], Any] | None = None
    ) -> None:
        modules = dict(model.named_modules())
        for path in paths:
            if module_path(path) not in modules or module_path(path) == "":
                raise no_such_layer(model, module_path(path))
        self._read = read
        self._kept: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self.paths = tuple(paths)
        self._handles = [self._tap(modules[module_path(path)], path) for path in dict.fromkeys(paths)]
        # Typed Any: `inplace` is an attribute of some activations only.
        self._in_place: list[Any] = []
        if read is None:
            self._in_place = [m for m in modules.values() if getattr(m, "inplace", False) is True]
        self._handles += [module.register_forward_pre_hook(self._spare) for module in self._in_place]

    def _tap(self, module: nn.Module, path: str) -> RemovableHandle:
        if path.endswith(INPUT):
            return module.register_forward_pre_hook(
                lambda _module, inputs, named: self._capture(path, [*inputs, *named.values()][0], False),
                with_kwargs=True,
            )
        channels_last = gives_channels_last(module)
        return module.register_forward_hook(lambda _module, _in, output: self._capture(path, output, channels_last))

    def _spare(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Before an activation works in place: if on a feature map that is kept, it works out of place from now on."""
        # Compiled code has no storage to ask about; the eager pass before it has decided.
        if torch.compiler.is_compiling() or not module.inplace:
            return
        written = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
        module.inplace = all(kept.untyped_storage().data_ptr() not in written for kept in self._kept.values())

    def _capture(self, path: str, value: Any, channels_last: bool) -> None:
        feature = feature_map(value, path, channels_last)
        if self._read is not None:
            self._kept[path] = self._read(path, feature)
            return
        self._kept[path] = feature
        # Compiled code knows no versions; the eager pass before it has shown what the network writes over.
        if not torch.compiler.is_compiling():
            self._versions[path] = _version(feature)

    def take(self) -> list[T]:
        """What was kept of the last forward pass, in the order of `paths`; it is no longer held here.

        Raises:
            InputError: a path whose module did not run; without `read` also a feature map that the network's own
                code wrote over in place, such as `out += shortcut` does, and which cannot be switched off.
        """
        for path in self.paths:
            if path not in self._kept:
                ran = [p for p in self.paths if p in self._kept]
                raise InputError(f"the layer {path!r} did not run in the forward pass; {nearest_paths(path, ran)}")
            if path in self._versions and _version(self._kept[path]) != self._versions[path]:
                raise InputError(
                    f"the network writes over what the layer {path!r} gives; choose the layer that contains it, "
                    "or the one after it"
                )
        kept = [self._kept[path] for path in self.paths]
        self.forget()
        return kept

    def forget(self) -> None:
        """Holds nothing any more of a forward pass that failed in the middle."""
        self._kept.clear()
        self._versions.clear()

    def close(self) -> None:
        """Removes the taps and gives in-place activations back."""
        for handle in self._handles:
            handle.remove()
        for module in self._in_place:
            module.inplace = True
        self._handles, self._in_place = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def no_such_layer(model: nn.Module, path: str) -> InputError:
    """The error for a path, or a pattern of paths, that the model does not have."""
    paths = (name for name, _ in model.named_modules())
    return InputError(f"{type(model).__name__} has no layer {path!r}; {nearest_paths(path, paths)}")


def nearest_paths(path: str, paths: Iterable[str]) -> str:
    """The mend for a wrong path: the nearest of those with as many segments, or of all if none has as many."""
    names = [name for name in paths if name]
    depth = path.count(".")
    return nearest(path, [name for name in names if name.count(".") == depth] or names)


def _version(feature: Tensor) -> int:
    """How often the tensor, or what it is a view of, was written over; inference mode does not count."""
    return 0 if feature.is_inference() else feature._version
