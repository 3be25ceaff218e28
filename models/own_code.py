"""The user's own functions, named as `path/to/file.py:function` or `package.module:function`."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, nearest, reason
from .libraries import is_library_name


def is_own_code(name: str) -> bool:
    """Whether the name points at the user's own code: it has a colon and is not one of torchvision or timm."""
    return ":" in name and not is_library_name(name)


def check_own_code(name: str, kind: str) -> None:
    """Checks the form of the name, and that its file or module is there, without running any code.

    Args:
        name: `path/to/file.py:function` or `package.module:function`.
        kind: what the function makes, for the message: "model" or "data set".

    Raises:
        InputError: what is no function's or module's name, a file or module that is not there.
    """
    place, _, function = name.rpartition(":")
    if not function.isidentifier():
        raise InputError(f"{kind} {name!r}: {function!r} is not a function's name; write path/to/file.py:function")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise InputError(f"{kind} {name!r}: there is no file {place}; give a path from the folder you are in")
    elif "" in place.split("."):
        raise InputError(f"{kind} {name!r}: {place!r} is not a module's name; write package.module:function")
    elif place not in sys.modules and not _specs_of_module(place):
        raise InputError(f"{kind} {name!r}: there is no module {place}; install it, or give path/to/file.py:function")


def load_own_code(name: str, kind: str) -> Callable[..., Any]:
    """Imports the file or module, which runs it, and gives the function. A file is read anew at each call.

    Args:
        name: `path/to/file.py:function` or `package.module:function`.
        kind: what the function makes, for the message: "model" or "data set".

    Raises:
        InputError: as `check_own_code`; a file or module that cannot be imported, or has no such function.
    """
    check_own_code(name, kind)
    place, _, function = name.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(name, place, kind)
    found: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(found):
        functions = [
            own
            for own, value in vars(module).items()
            if callable(value) and not own.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        raise InputError(f"{kind} {name!r}: {place} has no function {function!r}; {nearest(function, functions)}")
    return found


def own_code_path(name: str) -> Path | None:
    """The file behind the name, found without running any code.

    None: the name is no own code, or a module that no file on the import path holds.
    """
    if not is_own_code(name):
        return None
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    specs = _specs_of_module(place)
    if not specs or not specs[-1].has_location or specs[-1].origin is None:
        return None
    return Path(specs[-1].origin)


def own_code_sha256(name: str) -> str | None:
    """SHA-256 of the file that `own_code_path` finds, and of the `__init__.py` of its packages; None if it finds none.

    What these import in turn is not looked at.
    """
    if own_code_path(name) is None:
        return None
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for spec in _specs_of_module(place):
        # A namespace package has no file.
        if spec.has_location and spec.origin is not None:
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()


def _specs_of_module(place: str) -> list[ModuleSpec]:
    """Where the packages of a dotted module lie, and the module; empty if one of them is nowhere.

    `importlib.util.find_spec` would import, and so run, the packages.
    """
    specs: list[ModuleSpec] = []
    folders: list[str] | None = None
    names = place.split(".")
    for depth in range(1, len(names) + 1):
        spec = _spec_in(".".join(names[:depth]), folders)
        if spec is None:
            return []
        specs.append(spec)
        folders = list(spec.submodule_search_locations or ())
    return specs


def _spec_in(module: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """A module in the folders of its package, or on the import path; else what an editable installation knows."""
    found = PathFinder.find_spec(module.rpartition(".")[2], folders)
    if found is not None:
        return found
    others = (finder for finder in sys.meta_path if finder is not PathFinder)
    return next((spec for finder in others if (spec := finder.find_spec(module, folders)) is not None), None)


def _module_of_name(name: str, place: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise InputError(f"{kind} {name!r}: {error}; install the module or give path/to/file.py:function") from error


def _module_of_file(path: Path) -> ModuleType:
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
