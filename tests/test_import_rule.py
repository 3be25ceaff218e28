"""The import rule: models ← distill ← analysis ← search ← hintsearch, and each heavy library only in its place.

Importing is tested in subprocesses, for what a test run has loaded cannot be unloaded. Reading the source finds what
importing does not: imports inside functions.
"""

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

import pytest

import hintsearch

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "distill", "analysis", "search")  # each may import those before it

# The modules of analysis that need more than arrays: MLflow, Optuna, plotting.
NOT_NUMERIC = {f"hintsearch.analysis.{name}" for name in ("trials", "importance", "plots", "report")}
NUMERIC_NEEDS = {"numpy", "torch", "torchvision", "PIL", "sklearn", "safetensors", "yaml"}
BLOCKED = (
    "ray",
    "optuna",
    "mlflow",
    "pydantic",
    "pandas",
    "typer",
    "rich",
    "matplotlib",
    "plotly",
    "timm",
)

# Where each library may be imported: folders end in a slash.
PLACES = {
    "ray": ("search/",),
    "optuna": ("search/", "analysis/importance.py"),
    "mlflow": ("search/", "analysis/trials.py"),
    "pydantic": ("search/study.py", "search/study_sections.py", "search/study_types.py", "search/export.py"),
    "matplotlib": ("analysis/plots.py", "analysis/report.py"),
    "plotly": ("analysis/plots.py", "analysis/report.py"),
}


def _modules(folder: str) -> list[str]:
    package = import_module(f"hintsearch.{folder}")
    found = pkgutil.walk_packages(package.__path__, f"hintsearch.{folder}.")
    return [package.__name__, *(module.name for module in found)]


MODULES = {folder: _modules(folder) for folder in FOLDERS}
BELOW_SEARCH = [module for folder in FOLDERS[:-1] for module in MODULES[folder]]
NUMERIC = [module for module in BELOW_SEARCH if module not in NOT_NUMERIC]


def _folder(module: str) -> str:
    return module.split(".")[1]


def _above(folder: str) -> tuple[str, ...]:
    return FOLDERS[FOLDERS.index(folder) + 1 :]


# Importing


@dataclass(frozen=True)
class Imported:
    """What happened when a module was imported: the error, or "", and what was loaded that had not been before."""

    error: str
    loaded: frozenset[str]


IMPORT_EACH = """
import importlib, json, sys
modules, blocked = json.loads(sys.argv[1])
# None rather than a finder that raises: optional dependencies are asked for by find_spec, which must answer.
sys.modules.update(dict.fromkeys(blocked))
outcome = {}
for module in modules:
    before = set(sys.modules)
    try:
        importlib.import_module(module)
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    outcome[module] = [error, sorted(set(sys.modules) - before)]
print(json.dumps(outcome))
"""


@cache
def _import_each(modules: tuple[str, ...], blocked: tuple[str, ...], folder: Path) -> dict[str, Imported]:
    """Imports modules one after the other in one new process (torch alone takes seconds), launched from `folder`."""
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps([modules, blocked])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # A library may print while it is imported; the answer is the last line.
    answer = json.loads(done.stdout.splitlines()[-1])
    return {module: Imported(error, frozenset(loaded)) for module, (error, loaded) in answer.items()}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is no checkout, so that nothing is found by lying in it."""
    return tmp_path_factory.mktemp("elsewhere")


def _import_with_its_folder(module: str, elsewhere: Path) -> Imported:
    """Imports with the others of its folder, one process a folder; numeric modules without the search stack."""
    numeric = module not in NOT_NUMERIC
    together = tuple(other for other in MODULES[_folder(module)] if (other not in NOT_NUMERIC) is numeric)
    return _import_each(together, BLOCKED if numeric else (), elsewhere)[module]


@pytest.mark.parametrize("module", NUMERIC)
def test_numeric_module_imports_without_the_search_stack(module: str, elsewhere: Path) -> None:
    assert _import_with_its_folder(module, elsewhere).error == ""


@pytest.mark.parametrize("module", BELOW_SEARCH)
def test_importing_a_module_loads_no_folder_above_it(module: str, elsewhere: Path) -> None:
    imported = _import_with_its_folder(module, elsewhere)
    above = {f"hintsearch.{folder}" for folder in _above(_folder(module))}
    assert imported.error == ""
    assert not above & imported.loaded


@pytest.mark.parametrize("module", ["hintsearch", "hintsearch.models"])
def test_front_door_loads_no_search_stack(module: str, elsewhere: Path) -> None:
    imported = _import_each((module,), (), elsewhere)[module]
    assert imported.error == ""
    assert not {"ray", "mlflow", "pydantic", "optuna"} & imported.loaded


def test_trial_s_process_loads_nothing_that_only_the_driver_needs(elsewhere: Path) -> None:
    imported = _import_each(("hintsearch.search.trial",), (), elsewhere)["hintsearch.search.trial"]
    assert imported.error == ""
    assert not {"mlflow", "sklearn", "scipy", "torchvision", "matplotlib"} & imported.loaded


def test_blocking_a_library_makes_its_import_fail(elsewhere: Path) -> None:
    assert "ModuleNotFoundError" in _import_each(("colorsys",), ("colorsys",), elsewhere)["colorsys"].error


# Reading the source


@dataclass(frozen=True)
class Import:
    """One imported name, absolute, e.g. `hintsearch.models.zoo.build_model`."""

    file: str
    line: int
    name: str
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def _imports_of(root: Path) -> Iterator[Import]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            yield from _imports_in(path, path.relative_to(root))


def _imports_in(path: Path, relative: Path) -> Iterator[Import]:
    package = ("hintsearch", *relative.parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in _imported_names(node, package):
            yield Import(relative.as_posix(), getattr(node, "lineno", 0), name, id(node) not in inside)


def _imported_names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else ()
    source = ".".join([*base, *([node.module] if node.module else [])])
    # The name may be a module itself: `from .. import models`.
    return [f"{source}.{alias.name}" for alias in node.names]


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def upward_imports(root: Path, folder: str) -> list[str]:
    """Lists what a folder imports of those above it, the front door's public names included."""
    above = {f"hintsearch.{other}" for other in _above(folder)}
    public = {f"hintsearch.{name}" for name in hintsearch.__all__ if name != "__version__"}
    return [
        str(found)
        for found in _imports_of(root)
        if found.file.startswith(f"{folder}/")
        and (any(_is_in(found.name, package) for package in above) or found.name in public)
    ]


def misplaced_imports(root: Path, library: str) -> list[str]:
    """Lists the imports of a library in files that are not its place."""
    return [
        str(found)
        for found in _imports_of(root)
        if _is_in(found.name, library)
        and not any(
            found.file == place or (place[-1] == "/" and found.file.startswith(place)) for place in PLACES[library]
        )
    ]


def foreign_imports(root: Path) -> list[str]:
    """Lists what numeric modules import, at module level, beyond the libraries that numbers need."""
    allowed = NUMERIC_NEEDS | set(sys.stdlib_module_names) | {"hintsearch"}
    not_numeric = {f"{name.removeprefix('hintsearch.').replace('.', '/')}.py" for name in NOT_NUMERIC}
    return [
        str(found)
        for found in _imports_of(root)
        if not found.file.startswith("search/")
        and found.file not in not_numeric
        and found.at_module_level
        and found.name.split(".")[0] not in allowed
    ]


def eager_timm_imports(root: Path) -> list[str]:
    """Lists the imports of timm outside functions."""
    return [str(found) for found in _imports_of(root) if _is_in(found.name, "timm") and found.at_module_level]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_nothing_above_it(folder: str) -> None:
    assert upward_imports(ROOT, folder) == []


@pytest.mark.parametrize("library", PLACES)
def test_library_is_imported_only_in_its_place(library: str) -> None:
    assert misplaced_imports(ROOT, library) == []


def test_numeric_modules_import_only_what_numbers_need() -> None:
    assert foreign_imports(ROOT) == []


def test_timm_is_never_imported_at_module_level() -> None:
    assert eager_timm_imports(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..search.study import Study",
        "from .. import search",
        "from hintsearch.search import study",
        "import hintsearch.search.study",
        "from .. import run_search",
        "def late():\n    from ..search import study",
    ],
)
def test_an_upward_import_is_found(line: str, tmp_path: Path) -> None:
    _write(tmp_path, "analysis/pairing.py", line)
    assert len(upward_imports(tmp_path, "analysis")) == 1


@pytest.mark.parametrize(
    "line", ["from ..models.zoo import build_model", "from . import pairs", "from .. import __version__"]
)
def test_an_import_downward_or_beside_is_allowed(line: str, tmp_path: Path) -> None:
    _write(tmp_path, "analysis/pairing.py", line)
    assert upward_imports(tmp_path, "analysis") == []


def test_a_misplaced_library_is_found_even_inside_a_function(tmp_path: Path) -> None:
    _write(tmp_path, "search/study.py", "import pydantic")
    _write(tmp_path, "search/runner.py", "def late():\n    from pydantic.fields import Field")
    assert misplaced_imports(tmp_path, "pydantic") == ["search/runner.py:2 imports pydantic.fields.Field"]


def test_a_foreign_library_in_a_numeric_module_is_found(tmp_path: Path) -> None:
    _write(tmp_path, "analysis/plots.py", "import seaborn")
    _write(tmp_path, "analysis/pairing.py", "import json, numpy, seaborn")
    assert foreign_imports(tmp_path) == ["analysis/pairing.py:1 imports seaborn"]


def test_timm_is_found_at_module_level_but_allowed_in_a_function(tmp_path: Path) -> None:
    _write(
        tmp_path, "models/zoo.py", "try:\n    import timm\nexcept ImportError:\n    pass\ndef late():\n    import timm"
    )
    assert eager_timm_imports(tmp_path) == ["models/zoo.py:2 imports timm"]


def _write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")


# The front door


@pytest.mark.parametrize("name", hintsearch.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(hintsearch, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'run_serach'"):
        hintsearch.run_serach  # noqa: B018


def test_no_public_name_hides_a_subpackage() -> None:
    assert not set(hintsearch.__all__) & {*FOLDERS, "studies"}


def test_version_is_that_of_the_installed_package() -> None:
    assert hintsearch.__version__ == metadata.version("hintsearch")
