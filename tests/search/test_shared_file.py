"""What all trials read lies in a file: the same values, in memory once, and only what the search has written."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hintsearch.search.shared_file import SharedFile, reading, shared
from numpy.typing import NDArray


@dataclass
class Context:
    images: NDArray[np.uint8]
    others: dict[str, NDArray]
    name: str = "digits"


def context() -> Context:
    rng = np.random.default_rng(0)
    others = {
        "odd": rng.standard_normal(7),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(1.5),
        "columns": np.asfortranarray(rng.standard_normal((5, 4))),
        "strided": rng.standard_normal((6, 8))[::2, ::3],
        "bools": rng.random(3) > 0.5,
        "last": np.zeros(0),
    }
    return Context(rng.integers(0, 256, (11, 1, 9, 9), dtype=np.uint8), others)


def test_what_is_read_is_what_was_shared(tmp_path: Path) -> None:
    with shared(context(), tmp_path / "context") as file:
        read = file.read()
    assert read.name == "digits"
    np.testing.assert_array_equal(read.images, context().images)
    for name, array in context().others.items():
        np.testing.assert_array_equal(read.others[name], array)
        assert read.others[name].dtype == array.dtype
        assert read.others[name].flags.f_contiguous == array.flags.f_contiguous


def test_value_without_arrays_is_shared(tmp_path: Path) -> None:
    with shared({"epochs": [1, 2]}, tmp_path / "context") as file:
        assert file.read() == {"epochs": [1, 2]}


def test_arrays_are_aligned_read_only_and_not_copied(tmp_path: Path) -> None:
    with shared(context(), tmp_path / "context") as file:
        first, again = file.read(), file.read()
    assert first is again
    for array in (first.images, *(a for name, a in first.others.items() if name != "strided" and a.size)):
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_arrays_of_many_readers_are_one_in_memory(tmp_path: Path) -> None:
    """The pages of a process that has read all of it are those of the file: none is its own."""
    code = (
        "import pickle, re, sys; from hintsearch.search.shared_file import SharedFile;"
        "images = SharedFile(sys.argv[1], int(sys.argv[2]), sys.argv[3]).read()['images']; images.sum();"
        "maps = open('/proc/self/smaps').read();"
        "(one,) = (m for m in re.split(r'\\n(?=[0-9a-f]+-)', maps) if sys.argv[1] in m);"
        "print(*(re.search(key + r':\\s+(\\d+)', one)[1] for key in ('Rss', 'Private_Dirty', 'Anonymous')))"
    )
    with shared({"images": np.ones((4, 1 << 20), np.uint8)}, tmp_path / "context") as file:
        words = [sys.executable, "-c", code, file.path, str(file.size), file.sha256]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    resident, dirty, anonymous = map(int, ended.stdout.split())
    assert resident >= 4096
    assert (dirty, anonymous) == (0, 0)


def test_file_is_gone_after_the_context_whatever_ended_it(tmp_path: Path) -> None:
    def fail() -> None:
        with shared(context(), tmp_path / "context"):
            assert [path.name for path in tmp_path.iterdir()] == ["context"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_search_has_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "context").write_text("left")
    with shared({"a": 1}, tmp_path / "context") as file:
        assert file.read() == {"a": 1}


def test_file_that_something_else_has_written_is_not_unpickled(tmp_path: Path) -> None:
    with (
        shared({"a": 1}, tmp_path / "context") as file,
        shared({"a": "other"}, tmp_path / "context"),
        pytest.raises(ValueError, match="context was changed by something else than the search"),
    ):
        file.read()


@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_file_that_was_cut_short_is_not_unpickled(tmp_path: Path, left: int) -> None:
    with shared(context(), tmp_path / "context") as file:
        with (tmp_path / "context").open("r+b") as opened:
            opened.truncate(left if left >= 0 else file.size - 1)
        with pytest.raises(ValueError, match="context was changed by something else than the search"):
            file.read()


def test_relative_path_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with shared({"a": 2}, Path("results/context")) as file:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert file.read() == {"a": 2}


def test_trainable_is_given_what_is_shared(tmp_path: Path) -> None:
    seen = []
    with shared({"a": 3}, tmp_path / "context") as file:
        reading(lambda config, value: seen.append((config, value)), file)({"number": 1})
    assert seen == [({"number": 1}, {"a": 3})]
    assert isinstance(file, SharedFile)
