"""Which search a resume means, and what to type for one."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ..models.errors import InputError, nearest
from .events import Began, event_from_dict
from .journal import read_journal
from .places import JOURNAL_FILE
from .study import Study
from .study_file import study_names
from .study_sections import StorageSection


def existing_search(name: str, storage: str) -> str:
    """The search of that name in a storage folder, or the latest search of the study of that name.

    Raises:
        InputError: there is none; names the nearest.
    """
    folder = Path(storage)
    if (folder / name / JOURNAL_FILE).is_file():
        return name
    there = sorted(path.parent.name for path in folder.glob(f"*/{JOURNAL_FILE}"))
    of_study = [found for found in there if _study_name(folder / found / JOURNAL_FILE) == name]
    if of_study:
        return max(of_study, key=lambda found: (folder / found / JOURNAL_FILE).stat().st_mtime)
    mend = nearest(name, there) if there else "start one without --resume"
    raise InputError(f"there is no search {name!r} in {storage}; {mend}")


def _study_name(journal: Path) -> str | None:
    """The study of a search by the first line of its journal; None if that is damaged."""
    with journal.open("rb") as file:
        line = file.readline()
    try:
        began = event_from_dict(json.loads(line))
    except (ValueError, AttributeError):
        return None
    return str(began.study.get("name")) if isinstance(began, Began) else None


def check_no_search(study: str) -> None:
    """Raises `InputError` where what is given as a study is none, but the name of a search in the default folder."""
    is_study = Path(study).is_file() or study in study_names()
    if not is_study and (Path(StorageSection().path) / study / JOURNAL_FILE).is_file():
        raise InputError(f"{study} is a search, not a study; give it by --name {study}")


def check_unchanged(name: str, study: Study) -> None:
    """Refuses to resume with a study that differs from the journal's, which would be ignored silently.

    Raises:
        InputError: names the first key that differs.
    """
    first = read_journal(Path(study.storage.path) / name / JOURNAL_FILE).events[:1]
    if not first or not isinstance(first[0], Began):
        return
    before, now = first[0].study, study.resolved()
    for key in now:
        if before.get(key) != now[key]:
            raise InputError(
                f"the study's {key!r} has changed since {name} began; leave the study out to go on as it was, use "
                "--extend for more trials, or start a new search"
            )


def resume_command(
    name: str, study: str | None, overrides: Iterable[str], address: str | None, as_json: bool = False
) -> str:
    """What to type to go on with a search that was launched with these arguments."""
    words = ["search", *([study] if study else [])]
    for override in overrides:
        words += ["--set", override]
    words += ["--address", address] if address else []
    words += ["--name", name, "--resume", *(["--json"] if as_json else [])]
    return f"{program()} {shlex.join(words)}"


def program() -> str:
    """How to type the command line here: by name if that is on the path, else as it was typed."""
    if shutil.which("hintsearch"):
        return "hintsearch"
    typed = Path(sys.argv[0])
    if typed.name == "hintsearch":
        near = os.path.relpath(typed)
        return shlex.quote(str(typed.resolve()) if near.startswith("..") else near)
    return f"{shlex.quote(sys.executable)} -m hintsearch"
