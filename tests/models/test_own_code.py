import hashlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.models.own_code import check_own_code, is_own_code, load_own_code, own_code_path, own_code_sha256

LOUD = "raise RuntimeError('this ran')\n"


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `loud_pack.inner` with the module `nets`, none of which may be run; gives the module's file."""
    inner = tmp_path / "loud_pack" / "inner"
    inner.mkdir(parents=True)
    for path in (inner.parent / "__init__.py", inner / "__init__.py", inner / "nets.py"):
        path.write_text(LOUD)
    monkeypatch.syspath_prepend(tmp_path)
    return inner / "nets.py"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("resnet8", False),
        ("torchvision:resnet18", False),
        ("timm:resnet18.a1_in1k", False),
        ("nets.py:build", True),
        ("pack.nets:build", True),
        ("timm.models:resnet18", True),
    ],
)
def test_a_colon_marks_own_code_but_for_the_libraries(name: str, own: bool) -> None:
    assert is_own_code(name) is own


def test_own_function_is_found_by_file(own_factory: Path) -> None:
    assert load_own_code(f"{own_factory}:build_nothing", "model")(num_classes=5, in_channels=2) == {"classes": 5}


def test_own_function_is_found_by_module(own_module: str) -> None:
    assert load_own_code(f"{own_module}:build_nothing", "model")(num_classes=5, in_channels=2) == {"classes": 5}


def test_changed_own_file_is_read_anew(own_factory: Path) -> None:
    load_own_code(f"{own_factory}:build_net", "model")
    own_factory.write_text(own_factory.read_text().replace("build_net", "build_other_net"))
    assert load_own_code(f"{own_factory}:build_other_net", "model").__name__ == "build_other_net"


def test_own_file_may_define_a_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "with_settings.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Settings:\n    size: int\n\n"
        "def build(size):\n    return Settings(size).size\n"
    )
    assert load_own_code(f"{path}:build", "model")(4) == 4


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_wrong_function_in_own_file_is_an_error_with_the_nearest_function(own_factory: Path, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        load_own_code(f"{own_factory}:biuld_net", kind)
    assert str(caught.value) == (
        f"{kind} '{own_factory}:biuld_net': {own_factory} has no function 'biuld_net'; "
        "did you mean 'build_net'? (build_net, build_nothing)"
    )


def test_wrong_function_in_own_module_is_an_error_with_the_nearest_function(own_module: str) -> None:
    with pytest.raises(InputError, match=f"{own_module} has no function 'build_nte'; did you mean 'build_net'"):
        load_own_code(f"{own_module}:build_nte", "model")


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_missing_own_file_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "absent.py"
    with pytest.raises(InputError) as caught:
        check_own_code(f"{path}:build_net", kind)
    expected = f"{kind} '{path}:build_net': there is no file {path}; give a path from the folder you are in"
    assert str(caught.value) == expected


@pytest.mark.parametrize("place", ["no_such_module_anywhere", "json.no_such_module"])
def test_missing_own_module_is_an_error(place: str) -> None:
    with pytest.raises(InputError) as caught:
        check_own_code(f"{place}:build_net", "data set")
    assert str(caught.value) == (
        f"data set '{place}:build_net': there is no module {place}; install it, or give path/to/file.py:function"
    )


def test_module_that_imports_what_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_own_code("needy:build_net", "model")
    with pytest.raises(InputError) as caught:
        load_own_code("needy:build_net", "model")
    assert str(caught.value) == (
        "model 'needy:build_net': No module named 'no_such_module_anywhere'; "
        "install the module or give path/to/file.py:function"
    )


def test_own_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_anywhere\n")
    with pytest.raises(InputError, match=r"broken.py cannot be imported \(No module named .*\); mend it, or install"):
        load_own_code(f"{path}:build", "model")


@pytest.mark.parametrize("name", [":build", ".nets:build", "my..nets:build"])
@pytest.mark.parametrize("act", [check_own_code, load_own_code])
def test_broken_module_name_is_an_error(name: str, act: object) -> None:
    assert callable(act)
    with pytest.raises(InputError, match=r"is not a module's name; write package.module:function$"):
        act(name, "model")


def test_function_that_is_no_identifier_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r"'build net' is not a function's name; write path/to/file.py:function$"):
        check_own_code(f"{own_factory}:build net", "model")


def test_checking_runs_no_code_of_the_user(tmp_path: Path, own_package: Path) -> None:
    path = tmp_path / "loud.py"
    path.write_text(LOUD)
    check_own_code(f"{path}:build", "model")
    check_own_code("loud_pack.inner.nets:build", "model")
    with pytest.raises(RuntimeError, match="this ran"):
        load_own_code(f"{path}:build", "model")


def test_file_of_an_own_module_is_found_without_running_its_packages(own_package: Path) -> None:
    assert own_code_path("loud_pack.inner.nets:build") == own_package
    assert not {name for name in sys.modules if name.startswith("loud_pack")}


def test_file_of_an_own_package_is_its_init(own_package: Path) -> None:
    assert own_code_path("loud_pack.inner:build") == own_package.parent / "__init__.py"


def test_file_of_a_module_in_folders_without_init_is_found(own_package: Path) -> None:
    for folder in (own_package.parent, own_package.parent.parent):
        (folder / "__init__.py").unlink()
    assert own_code_path("loud_pack.inner.nets:build") == own_package


def test_file_of_a_module_that_only_an_editable_installation_knows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mapping:
        """As setuptools installs it: package names that no folder bears."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            place = places.get(name)
            return place and spec_from_file_location(name, place, submodule_search_locations=[])

    places = {"mapped_pack": tmp_path / "src" / "__init__.py", "mapped_pack.nets": tmp_path / "other" / "nets.py"}
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Mapping])
    assert own_code_path("mapped_pack.nets:build") == places["mapped_pack.nets"]


def test_file_of_an_own_file_is_itself(own_factory: Path) -> None:
    assert own_code_path(f"{own_factory}:build_net") == own_factory


@pytest.mark.parametrize("name", ["resnet8", "torchvision:resnet18", "no_such_pack.nets:build", "sys:exit"])
def test_what_has_no_file_has_no_path_and_no_hash(name: str) -> None:
    assert own_code_path(name) is None
    assert own_code_sha256(name) is None


def test_hash_is_that_of_the_file(own_factory: Path) -> None:
    expected = hashlib.sha256(own_factory.read_bytes()).hexdigest()
    assert own_code_sha256(f"{own_factory}:build_net") == expected


def test_hash_of_a_module_is_that_of_its_file_after_those_of_its_packages(own_package: Path) -> None:
    inner = own_package.parent
    packages = [folder / "__init__.py" for folder in (inner.parent, inner)]
    content = b"".join(path.read_bytes() for path in (*packages, own_package) if path.is_file())
    assert own_code_sha256("loud_pack.inner.nets:build") == hashlib.sha256(content).hexdigest()


def test_hash_follows_the_content(own_factory: Path) -> None:
    before = own_code_sha256(f"{own_factory}:build_net")
    own_factory.write_text(own_factory.read_text() + "\n# changed\n")
    assert own_code_sha256(f"{own_factory}:build_net") != before


def test_hash_of_a_module_changes_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hashed_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def big(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = own_code_sha256("hashed_package.nets:big")
    (package / "__init__.py").write_text("import os\n")
    assert before is not None
    assert own_code_sha256("hashed_package.nets:big") != before
