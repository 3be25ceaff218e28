"""What several test folders share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings
from processes import TINY_STUDY

# What `make test` finds on one machine it finds on any other. `make fuzz` draws examples of its own.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("drawn", derandomize=False, print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two torch threads on a busy machine were measured twenty times slower than one on networks this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_study_text() -> str:
    """A study of five trials that takes seconds."""
    return yaml.safe_dump(TINY_STUDY, sort_keys=False)


@pytest.fixture
def listing() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its content, to show that nothing was created or changed."""

    def of(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
            for path in sorted(folder.rglob("*"))
        }

    return of


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for tests that need not train the teacher themselves."""
    return tmp_path_factory.mktemp("cache")
