"""The user's own code that a study runs: shown before it runs, and recorded."""

from ..models.own_code import own_code_path, own_code_sha256
from .study import Study
from .view import View


def code_identities(study: Study) -> list[tuple[str, str, str]]:
    """What each piece of the user's own code is for, its file, and its SHA-256 (see `own_code_sha256`)."""
    return [(key, *_identity(name)) for key, name in study.own_code().items()]


def say_own_code(study: Study, view: View) -> None:
    """Tells what code the study runs beside hintsearch's own."""
    for purpose, name in study.own_code().items():
        say_code(purpose, name, view)


def say_code(purpose: str, name: str, view: View) -> None:
    """Tells what file a piece of the user's own code lies in, and its hash."""
    path, sha256 = _identity(name)
    view.say(f"{purpose[:1].upper()}{purpose[1:]} by your own code: {path} (sha256 {sha256[:12]}).")


def _identity(name: str) -> tuple[str, str]:
    return str(own_code_path(name) or name), own_code_sha256(name) or "unknown"
