import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.events import Began
from hintsearch.search.journal import SearchLog
from hintsearch.search.resuming import check_no_search, check_unchanged, existing_search, resume_command
from hintsearch.search.study import Study


@pytest.fixture
def launch(tmp_path: Path, digits: Study) -> Callable[..., None]:
    """Makes the folder and journal of a search; `age` in seconds."""

    def make(name: str, study: Study = digits, age: float = 0) -> None:
        journal = tmp_path / name / "journal.jsonl"
        journal.parent.mkdir()
        SearchLog(journal).record(Began(name, study.resolved(), "0.1.0", "sqlite:////tmp/mlflow.db"))
        written = journal.stat().st_mtime - age
        os.utime(journal, (written, written))

    return make


def test_search_is_found_by_its_name(launch: Callable[..., None], tmp_path: Path) -> None:
    launch("mine")
    launch("mine-20260101-120000")
    assert existing_search("mine", str(tmp_path)) == "mine"


def test_name_of_a_study_means_its_latest_search(launch: Callable[..., None], tmp_path: Path) -> None:
    launch("digits-20260101-120000", age=20)
    launch("digits-20260102-120000", age=0)
    launch("digits-20260103-120000", age=10)
    assert existing_search("digits", str(tmp_path)) == "digits-20260102-120000"


def test_unknown_search_names_the_nearest(launch: Callable[..., None], tmp_path: Path) -> None:
    launch("digits-20260101-120000")
    with pytest.raises(InputError) as caught:
        existing_search("digit-20260101-120000", str(tmp_path))
    assert str(caught.value) == (
        f"there is no search 'digit-20260101-120000' in {tmp_path}; did you mean 'digits-20260101-120000'? "
        "(digits-20260101-120000)"
    )


def test_storage_without_searches_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no search 'mine' in .*; start one without --resume"):
        existing_search("mine", str(tmp_path))


def test_search_in_the_place_of_a_study_is_said_how_to_name(
    launch: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch("mine")
    launch("digits")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "results").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "start")
    with pytest.raises(InputError, match=r"^mine is a search, not a study; give it by --name mine$"):
        check_no_search("mine")
    check_no_search("digits")  # both: the study is meant
    check_no_search("unknown")
    Path("mine").write_text("name: mine")
    check_no_search("mine")


def test_study_of_the_journal_may_be_given_again(
    launch: Callable[..., None], tmp_path: Path, studied: Callable[..., Study]
) -> None:
    study = studied(f"storage.path={tmp_path}")
    launch("mine", study)
    check_unchanged("mine", study)


def test_study_that_has_changed_is_refused_with_the_first_key(
    launch: Callable[..., None], tmp_path: Path, studied: Callable[..., Study]
) -> None:
    launch("mine", studied(f"storage.path={tmp_path}"))
    with pytest.raises(InputError, match=r"^the study's 'budget' has changed since mine began"):
        check_unchanged("mine", studied(f"storage.path={tmp_path}", "budget.trials=21"))


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an activated environment."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def test_resume_command_repeats_study_overrides_and_address(on_path: None) -> None:
    command = resume_command("mine", "my study.yaml", ["space.lr={low: 0.1, high: 1}"], "127.0.0.1:6379")
    assert command == (
        "hintsearch search 'my study.yaml' --set 'space.lr={low: 0.1, high: 1}' --address 127.0.0.1:6379 "
        "--name mine --resume"
    )


def test_resume_command_of_a_plain_search_is_short(on_path: None) -> None:
    assert resume_command("mine", None, [], None) == "hintsearch search --name mine --resume"


def test_resume_command_repeats_that_json_is_wanted(on_path: None) -> None:
    assert resume_command("mine", None, [], None, as_json=True) == "hintsearch search --name mine --resume --json"


def test_command_that_is_not_on_the_path_is_repeated_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / ".venv" / "bin" / "hintsearch"), "search"])
    assert resume_command("mine", None, [], None) == ".venv/bin/hintsearch search --name mine --resume"
