from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.running import running


def test_a_search_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with running(folder):
        with pytest.raises(InputError) as caught, running(folder):
            pass
        assert str(caught.value).startswith("the search mine is running; wait for its end")
    with running(folder):
        assert list(folder.iterdir()) == []
