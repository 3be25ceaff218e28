"""A line in the middle of the journal is damaged: the search is refused, the line named, nothing changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbances import Undisturbed
from processes import call

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros for a lost page": lambda line: bytes(len(line)),
    "its second half lost": lambda line: line[: len(line) // 2],
    "a flipped bit": lambda line: line.replace(b'"event"', b'"evunt"', 1),
    "bytes that are no text": lambda line: b"\xff\xfe" + line,
    "an event of no kind": lambda line: line.replace(b'"report"', b'"retort"', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_trap_5_a_damaged_line_is_named_and_nothing_is_changed(
    undisturbed: Undisturbed,
    cache: Path,
    listing: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    damage: str,
) -> None:
    results = tmp_path / "results" / "undisturbed"
    results.mkdir(parents=True)
    shutil.copy(undisturbed.results / "journal.jsonl", results)
    shutil.copy(undisturbed.results.parents[1] / "undisturbed.yaml", tmp_path)
    lines = (results / "journal.jsonl").read_bytes().split(b"\n")
    number = 1 + next(n for n, line in enumerate(lines) if n > len(lines) // 2 and b'"report"' in line)
    lines[number - 1] = DAMAGES[damage](lines[number - 1])
    (results / "journal.jsonl").write_bytes(b"\n".join(lines))
    before = listing(tmp_path)
    ended = call(["search", "undisturbed.yaml", "--name", "undisturbed", "--resume"], tmp_path, cache)
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert f"journal.jsonl is damaged in line {number} (" in line
    assert listing(tmp_path) == before
