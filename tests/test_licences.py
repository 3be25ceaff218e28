"""No dependency brings the GPL, AGPL or LGPL into hintsearch, which is Apache-2.0; the MPL-2.0 is allowed."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("test", "dev")

# Packages that say nothing about their licence, neither in their metadata nor in a file; each one was looked up.
LOOKED_UP = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"}

COPYLEFT = re.compile(r"\b[AL]?GPL|\bGNU\s+(Affero|Lesser|Library|General)\b|\bAffero\b", re.IGNORECASE)

# A licence is named in its first lines. Further down, whole texts quote the licences of what they are compatible
# with, or list those of bundled runtime libraries.
HEADING = 400


def is_copyleft(licence: str) -> bool:
    """Tells whether a licence obliges to the GPL, AGPL or LGPL, whichever alternative of it one takes.

    Args:
        licence: An SPDX expression, a trove classifier, the words of a `License` field, or the heading of a text.
            Only SPDX's operators `OR` and `AND`, in capitals, are read as such: "v2 or later" is no alternative.
    """
    if "\n" in licence:  # the text of a licence: "EXPRESS OR IMPLIED"
        return bool(COPYLEFT.search(licence))
    alternatives = _split(licence, "OR")
    if len(alternatives) > 1:
        return all(is_copyleft(alternative) for alternative in alternatives)
    parts = _split(licence, "AND")
    if len(parts) > 1:
        return any(is_copyleft(part) for part in parts)
    inner = _strip_parentheses(licence)
    return is_copyleft(inner) if inner != licence.strip() else bool(COPYLEFT.search(licence))


def _split(expression: str, operator: str) -> list[str]:
    """Splits at an operator where no parenthesis is open."""
    parts, depth = [""], 0
    for token in re.split(rf"(\(|\)|\b{operator}\b)", expression):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == operator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _strip_parentheses(expression: str) -> str:
    stripped = expression.strip()
    enclosed = stripped.startswith("(") and stripped.endswith(")") and _balanced(stripped[1:-1])
    return stripped[1:-1].strip() if enclosed else stripped


def _balanced(expression: str) -> bool:
    depth = 0
    for character in expression:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def licences_of(distribution: metadata.Distribution) -> list[str]:
    """Returns every licence a package states, all of which apply; empty if it states none."""
    if expression := _field(distribution, "License-Expression"):
        return expression
    stated = [
        classifier.removeprefix("License :: ").removeprefix("OSI Approved :: ")
        for classifier in _field(distribution, "Classifier")
        if classifier.startswith("License :: ") and classifier != "License :: OSI Approved"
    ]
    stated += [text[:HEADING] for text in _field(distribution, "License")]
    return stated or list(_licence_files(distribution))


def _field(distribution: metadata.Distribution, name: str) -> list[str]:
    return [str(value).strip() for value in distribution.metadata.get_all(name) or [] if str(value).strip()]


def _licence_files(distribution: metadata.Distribution) -> Iterator[str]:
    for path in distribution.files or []:
        if ".dist-info" in str(path) and re.match(r"(licen[cs]e|copying)", path.name, re.IGNORECASE):
            yield path.read_text(encoding="utf-8").strip()[:HEADING]


@cache
def dependency_tree() -> tuple[dict[str, metadata.Distribution], list[str]]:
    """Walks hintsearch's requirements, those of its extras, and theirs.

    Returns:
        The installed distributions by canonical name, and the required ones that are not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    missing: list[str] = []
    visited: set[tuple[str, str]] = set()
    waiting = [("hintsearch", extra) for extra in ("", *EXTRAS)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        found[name] = distribution
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return found, sorted(set(missing))


@pytest.mark.parametrize(
    "licence",
    [
        "GPL-3.0-or-later",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "GPLv2",
        "LGPLv3+",
        "LGPL-2.1-or-later",
        "AGPL-3.0-only",
        "GNU Affero General Public License v3",
        "GNU Lesser General Public License v2 or later (LGPLv2+)",
        "GNU General Public License (GPL)",
        "MIT AND GPL-3.0-only",
        "(MIT OR Apache-2.0) AND LGPL-2.1-only",
        "GPL-2.0-only OR LGPL-2.1-only",
        "(GPL-3.0-only)",
        "GNU GENERAL PUBLIC LICENSE\nVersion 3\nWITHOUT WARRANTY, EXPRESS OR IMPLIED",
    ],
)
def test_copyleft_licences_are_recognised(licence: str) -> None:
    assert is_copyleft(licence)


@pytest.mark.parametrize(
    "licence",
    [
        "MIT",
        "Apache-2.0 WITH LLVM-exception",
        "MPL-2.0 AND MIT",
        "Mozilla Public License 2.0 (MPL 2.0)",
        "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
        "Python Software Foundation License",
        "LicenseRef-NVIDIA-Proprietary",
        "MIT OR GPL-2.0",
        "GPL-2.0-only OR (MIT AND BSD-3-Clause)",
        "(MIT OR GPL-2.0-only) AND (BSD-3-Clause OR LGPL-2.1-only)",
    ],
)
def test_licences_with_a_permissive_choice_are_allowed(licence: str) -> None:
    assert not is_copyleft(licence)


def test_the_tree_reaches_dependencies_of_dependencies_and_of_extras() -> None:
    found, _ = dependency_tree()
    # click by typer, virtualenv by `dev`, iniconfig by `test`, aiohttp-cors by ray's own extra `default`.
    assert {"torch", "click", "virtualenv", "iniconfig", "aiohttp-cors"} <= found.keys()


def test_every_dependency_is_installed_so_that_its_licence_can_be_read() -> None:
    _, missing = dependency_tree()
    assert not missing, f"not installed: {', '.join(missing)}; run pip install -e '.[dev]'"


def test_every_dependency_states_a_licence() -> None:
    found, _ = dependency_tree()
    silent = [name for name, package in found.items() if not licences_of(package) and name not in LOOKED_UP]
    assert not silent, f"no licence stated by {', '.join(sorted(silent))}: look it up, then add it to LOOKED_UP"


def test_trap_35_no_dependency_is_under_the_gpl_agpl_or_lgpl() -> None:
    found, _ = dependency_tree()
    offenders = [
        f"{name} {package.version}: {licence.splitlines()[0]}"
        for name, package in sorted(found.items())
        for licence in licences_of(package)
        if is_copyleft(licence)
    ]
    assert not offenders, "copyleft dependencies:\n" + "\n".join(offenders)
