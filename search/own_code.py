"""The user's own code that a study runs: shown before it runs, and recorded."""

from ..models.own_code import own_code_path, own_code_sha256
from .study import Study
from .view import View


def code_identities(study: Study) -> list[tuple[str, str, str]]:
    """What each piece of the user's own code is for, its file, and the file's SHA-256."""
    return [
        (key, str(own_code_path(name) or name), own_code_sha256(name) or "unknown")
        for key, name in study.own_code().items()
    ]


def say_own_code(study: Study, view: View) -> None:
    """Tells what code the study runs beside hintsearch's own."""
    for key, path, sha256 in code_identities(study):
        view.say(f"{key.capitalize()} by your own code: {path} (sha256 {sha256[:12]}).")
