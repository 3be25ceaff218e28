import pytest
import torch
from hintsearch.models.candidates import list_candidates
from hintsearch.models.vgg import Vgg


@pytest.mark.parametrize(
    ("rows", "heights"), [(32, [32, 16, 8, 4, 4]), (63, [63, 31, 15, 7, 7]), (64, [64, 32, 16, 8, 4])]
)
def test_maps_are_halved_once_more_for_images_of_at_least_64_rows(rows: int, heights: list[int]) -> None:
    with torch.device("meta"):
        network = Vgg([[2], [3], [4], [5], [6]], 10, 3)
    assert [candidate.height for candidate in list_candidates(network, (3, rows, rows))] == heights
