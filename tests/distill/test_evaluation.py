import numpy as np
import pytest
import torch
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import ImageSet
from hintsearch.distill.evaluation import evaluate
from hintsearch.models.preprocessing import Preprocessing
from torch import Tensor, nn


class ReadsLogits(nn.Module):
    """Takes the first three pixels as its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0]


@pytest.fixture
def data() -> DeviceImages:
    """Five images 1×1×3, three of them classified right by `ReadsLogits`."""
    pixels = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 0], [0, 255, 0]]
    images = np.array(pixels, dtype=np.uint8).reshape(5, 1, 1, 3)
    return DeviceImages(ImageSet(images, np.array([0, 1, 2, 1, 0])), Preprocessing((0.0,), (1.0,)), torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_figures_are_means_over_images_whatever_the_batch_size(data: DeviceImages, batch_size: int) -> None:
    found = evaluate(ReadsLogits(), data, batch_size)
    right, wrong = -np.log(np.e / (np.e + 2)), -np.log(1 / (np.e + 2))
    assert found["accuracy"] == 0.6
    assert found["loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_network_is_restored(data: DeviceImages, training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), ReadsLogits()).train(training)
    evaluate(model, data, 2)
    assert {module.training for module in model.modules()} == {training}


def test_network_is_evaluated_in_eval_mode(data: DeviceImages) -> None:
    dropping = nn.Sequential(nn.Dropout(0.999), ReadsLogits()).train()
    assert evaluate(dropping, data, 2) == evaluate(ReadsLogits(), data, 2)


def test_batch_norm_statistics_are_left_as_they_were(data: DeviceImages) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), ReadsLogits()).train()
    evaluate(model, data, 2)
    assert model.get_buffer("0.num_batches_tracked").item() == 0


def test_no_gradient_is_tracked(data: DeviceImages) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), ReadsLogits())
    tracked: list[bool] = []
    model.register_forward_hook(lambda _module, _inputs, logits: tracked.append(logits.requires_grad))
    evaluate(model, data, 2)
    assert tracked == [False, False]
