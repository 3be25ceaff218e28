"""The networks a study can name, and how to build one."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from .errors import InputError, nearest, reason
from .registry import Registry
from .resnet import CifarResNet

_RESNET = "He et al. 2016, arXiv 1512.03385"
_REPDISTILLER = "Tian et al. 2020, arXiv 1910.10699"


class Factory(Protocol):
    """Builds a network of the zoo."""

    def __call__(self, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
        """A freshly initialised network, whose weights depend on torch's global generator only."""


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a network.

    Attributes:
        name: of the zoo (`resnet20`), or one's own factory as `path/to/file.py:function` or `package.module:function`.
        num_classes: outputs.
        in_channels: image channels.
        width: factor on every inner channel count; for networks of the zoo only.
    """

    name: str
    num_classes: int
    in_channels: int
    width: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain types; `ModelSpec(**spec.to_dict())` is the same spec."""
        return asdict(self)


MODELS: Registry[Factory] = Registry("model")


def _register_resnet(depth: int, channels: tuple[int, int, int, int], name: str, source: str) -> None:
    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        stem, first, second, third = (max(1, round(count * width)) for count in channels)
        return CifarResNet(depth, (stem, first, second, third), num_classes, in_channels)

    blocks = (depth - 2) // 2
    described = "/".join(str(count) for count in channels[1:])
    MODELS.register(name, source=source, candidates=f"{blocks} residual blocks", channels=described)(build)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register_resnet(_depth, (16, 16, 32, 64), f"resnet{_depth}", _RESNET)
for _depth in (8, 32):
    _register_resnet(_depth, (32, 64, 128, 256), f"resnet{_depth}x4", _REPDISTILLER)


def is_own_factory(name: str) -> bool:
    """Whether the name points at the user's own code instead of the zoo."""
    return ":" in name


def check_model_name(name: str) -> None:
    """Raises `InputError` for a name that `build_model` cannot resolve, without running any code of the user's."""
    if not is_own_factory(name):
        MODELS.entry(name)
        return
    place, _, function = name.rpartition(":")
    if not function.isidentifier():
        raise InputError(f"model {name!r}: {function!r} is not a function's name; write path/to/file.py:function")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise InputError(f"model {name!r}: there is no file {place}; give a path from the folder you are in")
    elif "" in place.split("."):
        raise InputError(f"model {name!r}: {place!r} is not a module's name; write package.module:function")


def own_factory_sha256(name: str) -> str | None:
    """SHA-256 of the file behind `path/to/file.py:function`; None for the zoo and for installed modules."""
    place = name.rpartition(":")[0]
    return hashlib.sha256(Path(place).read_bytes()).hexdigest() if place.endswith(".py") else None


def build_model(spec: ModelSpec) -> nn.Module:
    """Builds the network, freshly initialised from torch's global generator.

    Raises:
        InputError: unknown name, a width below 0 or on one's own factory, a factory that cannot be imported.
    """
    check_model_name(spec.name)
    if not spec.width > 0:
        raise InputError(f"the width of {spec.name} is {spec.width}, but must be above 0; 1 is the published width")
    if not is_own_factory(spec.name):
        factory = MODELS.get(spec.name)
        return factory(num_classes=spec.num_classes, in_channels=spec.in_channels, width=spec.width)
    if spec.width != 1.0:
        raise InputError(
            f"the width of {spec.name} is {spec.width}, but only networks of the zoo have one; leave it out"
        )
    try:
        model = _own_factory(spec.name)(num_classes=spec.num_classes, in_channels=spec.in_channels)
    except TypeError as error:
        raise InputError(
            f"{spec.name} cannot be called ({reason(error)}); it must take num_classes and in_channels by name"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.name} returned a {type(model).__name__}, but must return a torch.nn.Module")
    return model


def _own_factory(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(name, place)
    factory = getattr(module, function, None)
    if not callable(factory):
        functions = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        raise InputError(f"model {name!r}: {place} has no function {function!r}; {nearest(function, functions)}")
    found: Callable[..., Any] = factory
    return found


def _module_of_name(name: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise InputError(f"model {name!r}: {error}; install the module or give path/to/file.py:function") from error


def _module_of_file(path: Path) -> Any:
    module_name = f"hintsearch_own_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python; give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, NameError) as error:
        raise InputError(f"{path} cannot be imported ({reason(error)}); mend it, or install what it needs") from error
    return module
