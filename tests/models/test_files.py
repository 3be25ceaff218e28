import os
from pathlib import Path

import pytest
from hintsearch.models.files import replacing


class DiskFullError(OSError):
    pass


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("ne")
        raise DiskFullError


def test_replacing_puts_the_written_file_in_place(tmp_path: Path) -> None:
    with replacing(tmp_path / "result.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "result.txt").read_text() == "new"


def test_replacing_leaves_only_the_result(tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("old")
    with replacing(tmp_path / "result.txt") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


def test_replacing_shows_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("old")
    with replacing(tmp_path / "result.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "result.txt").read_text() == "old"


def test_replacing_keeps_the_old_file_on_an_exception(tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("old")
    with pytest.raises(DiskFullError):
        write_half(tmp_path / "result.txt")
    assert (tmp_path / "result.txt").read_text() == "old"


def test_replacing_leaves_nothing_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError):
        write_half(tmp_path / "result.txt")
    assert list(tmp_path.iterdir()) == []


def test_replacing_leaves_nothing_when_the_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "result.txt").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "result.txt") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


def test_replacing_makes_missing_folders(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b" / "result.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a" / "b" / "result.txt").read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_replacing_gives_the_file_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "result.txt") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "result.txt").stat().st_mode & 0o777 == mode
