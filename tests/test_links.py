"""What the documentation links to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")]
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_in_the_repository(page: Path) -> None:
    linked = LINK.findall(page.read_text())
    assert [link for link in linked if not (page.parent / link).exists()] == []


def test_links_are_found() -> None:
    assert LINK.findall("[a](docs/a.md) ![b](b.png) [c](https://c.org) [d](#d) [e](e.md#part)") == [
        "docs/a.md",
        "b.png",
        "e.md",
    ]
