import numpy as np
import pytest
import torch
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import ImageSet
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution
from hintsearch.models.preprocessing import Preprocessing
from sklearn.metrics import accuracy_score, f1_score
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


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        ([0, 1, 2, 3, 3, 3, 0], [0, 1, 2, 3, 0, 3, 1]),
        # No image of class 3, none of class 2 but predicted, none predicted of class 1.
        ([0, 1, 0, 1, 0], [0, 0, 2, 2, 0]),
        ([3, 3], [3, 3]),
        ([0, 0], [1, 2]),
    ],
    ids=["all classes", "some absent", "one class", "none right"],
)
@pytest.mark.parametrize("batch_size", [1, 100])
def test_macro_f1_is_that_of_scikit_learn(labels: list[int], predicted: list[int], batch_size: int) -> None:
    pixels = 255 * np.eye(4, dtype=np.uint8)[predicted].reshape(-1, 1, 1, 4)
    images = ImageSet(pixels, np.array(labels, dtype=np.int64))
    data = DeviceImages(images, Preprocessing((0.0,), (1.0,)), torch.device("cpu"))
    found = evaluate(ReadsLogits(), data, batch_size)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))


def test_teacher_is_evaluated_on_what_it_takes(data: DeviceImages) -> None:
    inverted = Preprocessing((1.0,), (-1.0,))
    both = DeviceImages(
        ImageSet(data.images.numpy(), data.labels.numpy()), Preprocessing((0.0,), (1.0,)), data.device, inverted
    )
    only = DeviceImages(ImageSet(data.images.numpy(), data.labels.numpy()), inverted, data.device)
    assert evaluate(ReadsLogits(), both, 2) == evaluate(ReadsLogits(), data, 2)
    assert evaluate(ReadsLogits(), both, 2, as_teacher=True) == evaluate(ReadsLogits(), only, 2)
    assert evaluate(ReadsLogits(), only, 2) != evaluate(ReadsLogits(), data, 2)


def test_network_is_evaluated_in_the_precision(data: DeviceImages) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    given: list[torch.dtype] = []
    model.register_forward_hook(lambda _module, _inputs, logits: given.append(logits.dtype))
    exact = evaluate(model, data, 5)
    rounded = evaluate(model, data, 5, Execution(precision="bf16"))
    assert given == [torch.float32, torch.bfloat16]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
