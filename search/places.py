"""Where things lie: the cache, the results of a search, the tracking store."""

import os
from datetime import datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ..models.errors import InputError

SQLITE = "sqlite:///"
JOURNAL_FILE = "journal.jsonl"


def cache_folder() -> Path:
    """`HINTSEARCH_CACHE`, or `~/.cache/hintsearch`."""
    return Path(os.environ.get("HINTSEARCH_CACHE") or Path.home() / ".cache" / "hintsearch").expanduser().resolve()


def cached_teacher_path(sha256: str) -> Path:
    """Where the cache keeps a teacher's weights of that hash."""
    return cache_folder() / "teachers" / f"{sha256}.safetensors"


def tracking_uri(option: str | None, study_uri: str | None) -> str:
    """The tracking store: the option, then `MLFLOW_TRACKING_URI`, then the study, then sqlite in the present folder.

    A relative sqlite path is made absolute, so that the store stays the same wherever it is used from.
    """
    uri = option or os.environ.get("MLFLOW_TRACKING_URI") or study_uri or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).expanduser().resolve()}"
    if _has_secret(uri):
        # The journal, the exported file and MLflow's own pages would show it.
        raise InputError(
            "the tracking store's address holds a password or a token; leave it out and set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (PGPASSWORD for PostgreSQL)"
        )
    if "://" not in uri:
        raise InputError(f"the tracking store {uri!r} is no address; write sqlite:///FILE or http://HOST:PORT")
    return uri


def _has_secret(uri: str) -> bool:
    """Whether an address holds a password, or what a server takes as a token in the place of a user."""
    parts = urlsplit(uri)
    in_query = {"password", "sslpassword"} & set(parse_qs(parts.query))
    return bool(parts.password or in_query or (parts.username and parts.scheme in ("http", "https")))


def sqlite_file(uri: str) -> Path | None:
    """The file behind a sqlite store; None for other stores."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def new_search_name(study_name: str) -> str:
    """`STUDY-YYYYmmdd-HHMMSS` by the local clock."""
    return f"{study_name}-{datetime.now():%Y%m%d-%H%M%S}"
