"""Reading inner layers of a network by module path, without touching the network's code."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from .errors import InputError, nearest


class LayerTaps:
    """Captures the outputs of named modules at each forward pass.

    In-place activations are switched off while the taps are on, so that a captured tensor keeps its values when a
    later module would have written over it. Used as a context manager, or closed by `close`.

    Args:
        model: the network.
        paths: module paths as `named_modules` gives them, such as `layer1.0`.

    Raises:
        InputError: a path that the model does not have; names the nearest.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for path in paths:
            if path not in modules or path == "":
                raise InputError(f"{type(model).__name__} has no layer {path!r}; {_near(path, modules)}")
        self._features: dict[str, Tensor] = {}
        self._paths = tuple(paths)
        # Typed Any: `inplace` is an attribute of some activations only.
        self._made_out_of_place: list[Any] = [m for m in modules.values() if getattr(m, "inplace", False) is True]
        for module in self._made_out_of_place:
            module.inplace = False
        self._handles = [modules[path].register_forward_hook(self._capture(path)) for path in self._paths]

    def _capture(self, path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._features[path] = output

        return hook

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, in the order of `paths`; they are no longer held here.

        Raises:
            InputError: a path whose module did not run.
        """
        for path in self._paths:
            if path not in self._features:
                ran = [p for p in self._paths if p in self._features]
                raise InputError(f"the layer {path!r} did not run in the forward pass; {_near(path, ran)}")
        features = [self._features[path] for path in self._paths]
        self._features.clear()
        return features

    def close(self) -> None:
        """Removes the taps and gives in-place activations back."""
        for handle in self._handles:
            handle.remove()
        for module in self._made_out_of_place:
            module.inplace = True
        self._handles, self._made_out_of_place = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _near(path: str, paths: Any) -> str:
    names = [name for name in paths if name]
    depth = path.count(".")
    return nearest(path, [name for name in names if name.count(".") == depth] or names)
