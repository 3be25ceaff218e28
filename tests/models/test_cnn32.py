import torch
from hintsearch.models.cnn32 import Cnn32
from torch import nn


def test_averaging_the_last_map_changes_nothing_for_images_of_32_rows() -> None:
    network = Cnn32((4, 5, 6), 7, 3, 1).eval()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    averaged = network(images)
    network.average = nn.Identity()  # type: ignore[assignment]
    assert torch.equal(network(images), averaged)
