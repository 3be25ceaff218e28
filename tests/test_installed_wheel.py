"""An installed wheel works, wherever it is used from: in an empty folder, and in a checkout that would shadow it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import TINY_STUDY, CommandLine, wait_for

CHECKOUT = Path(__file__).resolve().parent.parent
TWO_TRIALS = {**TINY_STUDY, "controls": {"arms": ["kd_only"], "trials": 1}, "budget": {"trials": 1, "rungs": [1]}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as `pip install --target` lays it out."""
    target = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source") / "hintsearch"
    tracked = ("hintsearch", "models", "distill", "analysis", "search", "studies", "pyproject.toml", "README.md")
    copy.mkdir()
    # A copy without build/: setuptools would put what an earlier build left there into the wheel.
    subprocess.run(["cp", "-r", *tracked, "LICENSE", str(copy)], cwd=CHECKOUT, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, timeout=120)
    return target


def _origin(command_line: CommandLine, folder: Path, module: str) -> str:
    program = f"import importlib; print(importlib.import_module({module!r}).__file__)"
    environment = command_line.environment
    asked = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    return asked.stdout.strip()


def _search(installed: Path, folder: Path, cache: Path, work: Path, name: str) -> None:
    study = work / "two.yaml"
    study.write_text(yaml.safe_dump({**TWO_TRIALS, "storage": {"path": str(work / "results")}}))
    command_line = CommandLine(cache, environment={"PYTHONPATH": str(installed)})
    assert _origin(command_line, folder, "hintsearch.search.runner").startswith(str(installed))
    store = f"sqlite:///{work / 'mlflow.db'}"
    ended = command_line.run(["search", str(study), "--name", name, "--tracking", store, "--json"], folder)
    assert ended.code == 0, ended.err
    assert [trial["outcome"] for trial in ended.document()["trials"]] == ["completed", "completed"]
    assert wait_for(lambda: not command_line.processes(), 10)


def test_a_wheel_searches_from_an_empty_folder(installed: Path, shared_cache: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    _search(installed, empty, shared_cache, tmp_path, "empty")
    assert list(empty.iterdir()) == []


def test_a_wheel_searches_from_the_root_of_a_checkout(installed: Path, shared_cache: Path, tmp_path: Path) -> None:
    _search(installed, CHECKOUT, shared_cache, tmp_path, "checkout")


def test_the_wheel_carries_its_studies(installed: Path) -> None:
    assert (installed / "hintsearch" / "studies" / "digits.yaml").is_file()
