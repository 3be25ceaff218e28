"""A plain distillation loop as the field writes it: the baseline of `train_speed.py`.

PIL transforms in a DataLoader's worker processes, float32 in torch's default memory format, the teacher's whole forward
pass with a list of features by hooks, and meters that read the loss and the accuracy at every step. Neither tuned nor
made slow. Run alone, it trains resnet20 from resnet56 on random images and prints its images per second:

    python benchmarks/plain_loop.py
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from hintsearch.models.zoo import ModelSpec, build_model
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TEMPERATURE = 4.0
WORKERS = 2
# The stem, the stages and the pooled features, as published networks for distillation return them.
FEATURES = ("relu", "layer1", "layer2", "layer3", "avgpool")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images in memory that become PIL images one by one, as torchvision's CIFAR100 has it.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
        transform: PIL image → tensor.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], transform: Any) -> None:
        self.images, self.targets, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.targets[index]


class AverageMeter:
    """The running mean of a figure."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, images: int) -> None:
        """Adds the mean of some images."""
        self.total += value * images
        self.count += images

    @property
    def mean(self) -> float:
        """Over all images so far."""
        return self.total / max(self.count, 1)


class FeatureList:
    """What some modules gave in the last forward pass.

    Args:
        model: the network.
        names: of its modules.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] = FEATURES) -> None:
        self._found: dict[str, Tensor] = {}
        self._names = names
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._found[name] = output

        return keep

    def take(self) -> list[Tensor]:
        """The outputs in the order of the names."""
        return [self._found.pop(name) for name in self._names]


class PlainLoop:
    """Knowledge distillation with a FitNet hint between one stage of the teacher and one of the student.

    Args:
        teacher: a trained network of `hintsearch.models.resnet`.
        student: another one, to be trained.
        hint: position in `FEATURES` of the layers of the hint.
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
        mean: channel means in 0..1.
        sd: channel standard deviations in 0..1.
        batch_size: images a step.
        lr: learning rate.
        device: where both networks run.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        hint: int,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        mean: tuple[float, ...],
        sd: tuple[float, ...],
        batch_size: int = 64,
        lr: float = 0.05,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, sd),
            ]
        )
        dataset = ImageDataset(images, labels, transform)
        self.loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)
        self.teacher, self.student, self.hint = teacher.to(self.device), student.to(self.device), hint
        self.teacher_features, self.student_features = FeatureList(teacher), FeatureList(student)
        self.regressor = self._regressor(images.shape[1]).to(self.device)
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *self.regressor.parameters()], lr=lr, momentum=0.9, weight_decay=5e-4
        )
        self.losses, self.accuracies = AverageMeter(), AverageMeter()
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def train(self, steps: int) -> None:
        """Trains for some steps; the DataLoader stays where it is, and goes on with the next call."""
        self.teacher.eval()
        self.student.train()
        if self._batches is None:
            self._batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for images, labels in itertools.islice(self._batches, steps):
            self._step(images.to(self.device), labels.to(self.device))

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None

    def _step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.student(images)
        features = self.student_features.take()
        with torch.no_grad():
            teacher_logits = self.teacher(images)
            teacher_features = [feature.detach() for feature in self.teacher_features.take()]

        classification = functional.cross_entropy(logits, labels)
        divergence = TEMPERATURE**2 * functional.kl_div(
            functional.log_softmax(logits / TEMPERATURE, dim=1),
            functional.softmax(teacher_logits / TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        hint = functional.mse_loss(self.regressor(features[self.hint]), teacher_features[self.hint])
        loss = classification + divergence + hint

        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.losses.update(loss.item(), len(images))
        self.accuracies.update(accuracy.item(), len(images))

        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _regressor(self, size: int) -> nn.Module:
        """A 1×1 convolution from the student's to the teacher's channels."""
        image = torch.randn(2, 3, size, size, device=self.device)
        self.teacher.eval()
        self.student.eval()
        with torch.no_grad():
            self.teacher(image)
            self.student(image)
        ours, theirs = self.student_features.take()[self.hint], self.teacher_features.take()[self.hint]
        return nn.Conv2d(ours.shape[1], theirs.shape[1], 1)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Gives an untrained network the batch-norm statistics of some images: in eval mode its features would explode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all passes, of which there is one
    model.train()
    model(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5_000, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 100, len(images), dtype=np.int64)
    teacher, student = (build_model(ModelSpec(name, 100, 3)) for name in ("resnet56", "resnet20"))
    calibrate(teacher, torch.randn(256, 3, 32, 32))
    device = torch.device(options.device)
    loop = PlainLoop(teacher, student, 2, images, labels, (0.5,) * 3, (0.25,) * 3, device=device)
    loop.train(2 * WORKERS)
    started = time.perf_counter()
    loop.train(options.steps)  # waits for the device at every step
    seconds = time.perf_counter() - started
    loop.close()
    print(f"{options.steps * 64 / seconds:.0f} images a second; mean loss {loop.losses.mean:.3f}")


if __name__ == "__main__":
    main()
