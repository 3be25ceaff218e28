import pytest
from hintsearch.models.channel_counts import scaled


@pytest.mark.parametrize(
    ("count", "width", "multiple", "expected"),
    [
        (64, 1.0, 1, 64),
        (64, 0.5, 1, 32),
        (24, 0.3, 1, 7),
        (16, 0.01, 1, 1),
        (240, 0.5, 12, 120),
        (116, 0.3, 2, 34),
        (24, 0.1, 12, 12),
    ],
)
def test_counts_become_multiples_and_never_vanish(count: int, width: float, multiple: int, expected: int) -> None:
    assert scaled(count, width, multiple) == expected
