from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.places import cache_folder, cached_teacher_path, new_search_name, sqlite_file, tracking_uri

OPTION, VARIABLE, STUDY = "http://option:5000", "http://variable:5000", "http://study:5000"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, without settings from outside."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "HINTSEARCH_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_option_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", VARIABLE)
    assert tracking_uri(OPTION, STUDY) == OPTION


def test_environment_comes_before_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", VARIABLE)
    assert tracking_uri(None, STUDY) == VARIABLE


def test_study_comes_before_the_default() -> None:
    assert tracking_uri(None, STUDY) == STUDY


def test_default_is_a_sqlite_file_in_the_present_folder(folder: Path) -> None:
    assert tracking_uri(None, None) == f"sqlite:///{folder}/mlflow.db"


@pytest.mark.parametrize("uri", ["sqlite:///mlruns/a.db", "sqlite:///./mlruns/a.db", "sqlite:///b/../mlruns/a.db"])
def test_relative_sqlite_path_becomes_absolute(folder: Path, uri: str) -> None:
    assert tracking_uri(uri, None) == f"sqlite:///{folder}/mlruns/a.db"


def test_absolute_sqlite_path_stays(folder: Path) -> None:
    assert tracking_uri(f"sqlite:///{folder}/a.db", None) == f"sqlite:///{folder}/a.db"


@pytest.mark.parametrize("uri", ["mlflow.db", "/tmp/mlflow.db", "localhost:5000"])
def test_store_without_a_scheme_is_refused(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        tracking_uri(uri, None)
    assert str(caught.value) == (f"the tracking store {uri!r} is no address; write sqlite:///FILE or http://HOST:PORT")


def test_file_behind_a_sqlite_store_is_known() -> None:
    assert sqlite_file("sqlite:////tmp/a.db") == Path("/tmp/a.db")


def test_server_has_no_file() -> None:
    assert sqlite_file("http://host:5000") is None


def test_cache_is_where_the_variable_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINTSEARCH_CACHE", "mine")
    assert cache_folder() == folder / "mine"


def test_cache_lies_in_the_home_folder_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert cache_folder() == folder / ".cache" / "hintsearch"


def test_teacher_is_cached_by_its_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINTSEARCH_CACHE", str(folder))
    assert cached_teacher_path("abc") == folder / "teachers" / "abc.safetensors"


def test_new_search_is_named_by_study_and_clock() -> None:
    name = new_search_name("digits")
    assert name.startswith("digits-20")
    assert len(name) == len("digits-YYYYmmdd-HHMMSS")
