"""A residual student with taps, an adapter and hints of images, small enough to differentiate one image at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hintsearch.models.taps import LayerTaps
from torch import Tensor, nn
from torch.nn import functional

IMAGES, CLASSES, WIDTH, TEACHER_WIDTH = 5, 4, 4, 6


class SmallStudent(nn.Module):
    """Convolution, batch norm, activation in place, a block with a shortcut, average pool, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * WIDTH)
        self.shortcut = nn.Sequential(nn.Conv2d(WIDTH, 2 * WIDTH, 1, 2, bias=False), nn.BatchNorm2d(2 * WIDTH))
        self.fc = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)) + self.shortcut(x))
        logits: Tensor = self.fc(functional.avg_pool2d(x, x.shape[2:]).flatten(1))
        return logits


@dataclass
class Outputs:
    """What a hint reads: logits [B, 4], maps [B, 4, 8, 8] and [B, 8, 4, 4], the adapted one [B, 6, 8, 8]."""

    logits: Tensor
    early: Tensor
    late: Tensor
    adapted: Tensor


class Whole(nn.Module):
    """The student, an adapter that only a hint reaches, and taps; one of them before an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.student = SmallStudent()
        self.adapter = nn.Conv2d(WIDTH, TEACHER_WIDTH, 1)
        self.taps: LayerTaps[Tensor] = LayerTaps(self.student, ["bn1", "shortcut"])

    def outputs(self, images: Tensor, bf16: bool = False) -> Outputs:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = self.student(images)
            early, late = self.taps.take()
            adapted = self.adapter(early)
        return Outputs(*(tensor.to(images.dtype) for tensor in (logits, early, late, adapted)))


Hint = Callable[[Outputs, Outputs], Tensor]


def divergence(ours: Outputs, theirs: Outputs) -> Tensor:
    log_ours, log_theirs = (functional.log_softmax(of.logits / 4, dim=1) for of in (ours, theirs))
    return 16 * functional.kl_div(log_ours, log_theirs, reduction="none", log_target=True).sum(dim=1)


def doubted(ours: Outputs, theirs: Outputs) -> Tensor:
    """Weighed by what the student knows; the weight has no gradient, as in `wsl`."""
    with torch.no_grad():
        weight = ours.logits.mul(2).softmax(dim=1).amax(dim=1)
        weight.add_(ours.logits[:, 0].square())
    return weight * divergence(ours, theirs)


def attention(ours: Outputs, theirs: Outputs) -> Tensor:
    pooled = (functional.adaptive_avg_pool2d(of.early, 4) for of in (ours, theirs))
    maps, targets = (functional.normalize(p.square().mean(dim=1).flatten(1), dim=1) for p in pooled)
    return (maps - targets).square().sum(dim=1)


def regression(ours: Outputs, theirs: Outputs) -> Tensor:
    return functional.mse_loss(ours.adapted, theirs.adapted, reduction="none").mean(dim=(1, 2, 3))


def similarity(ours: Outputs, theirs: Outputs) -> Tensor:
    rows = (functional.normalize(of.late.flatten(1) @ of.late.flatten(1).t(), dim=1) for of in (ours, theirs))
    return (next(rows) - next(rows)).square().sum(dim=1)


def kernel(ours: Outputs, theirs: Outputs) -> Tensor:
    both = (functional.normalize(of.late.flatten(2), dim=2) for of in (ours, theirs))
    products = torch.bmm(next(both), next(both).transpose(1, 2))
    return functional.smooth_l1_loss(products, torch.zeros_like(products), reduction="none").sum(dim=(1, 2))


def distances(ours: Outputs, theirs: Outputs) -> Tensor:
    """By `cdist`, of which torch has no forward-mode derivative."""
    pooled = (of.late.mean(dim=(2, 3)) for of in (ours, theirs))
    return torch.cdist(next(pooled), next(pooled)).square().mean(dim=1)


def distances_written_out(ours: Outputs, theirs: Outputs) -> Tensor:
    """The same of operations that have one."""
    pooled = (of.late.mean(dim=(2, 3)) for of in (ours, theirs))
    return (next(pooled)[:, None] - next(pooled)[None]).square().sum(dim=2).mean(dim=1)


@dataclass
class Lesson:
    """A student in training mode on one batch, with what it is taught."""

    whole: Whole
    images: Tensor
    labels: Tensor
    theirs: Outputs

    def hints(self, *hints: Hint, bf16: bool = False) -> Tensor:
        """[B, hints]."""
        ours = self.whole.outputs(self.images, bf16)
        return torch.stack([hint(ours, self.theirs) for hint in hints], dim=1)

    def cross_entropies(self) -> Tensor:
        """[B]."""
        return functional.cross_entropy(self.whole.outputs(self.images).logits, self.labels, reduction="none")


def lesson(dtype: torch.dtype = torch.float64, images: int = IMAGES) -> Lesson:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        whole = Whole().train()
        for module in whole.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
        whole.to(dtype).to(memory_format=torch.channels_last)
        theirs = Outputs(
            torch.randn(images, CLASSES).to(dtype),
            torch.randn(images, WIDTH, 8, 8).to(dtype),
            torch.randn(images, 2 * WIDTH, 4, 4).to(dtype),
            torch.randn(images, TEACHER_WIDTH, 8, 8).to(dtype),
        )
        batch = torch.randn(images, 2, 8, 8).to(dtype).to(memory_format=torch.channels_last)
        return Lesson(whole, batch, torch.arange(images) % CLASSES, theirs)


def direction(module: nn.Module) -> dict[str, Tensor]:
    """A random one, of every parameter."""
    generator = torch.Generator().manual_seed(12)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in module.named_parameters()
    }


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_as_it_was(module: nn.Module, state: dict[str, Tensor]) -> bool:
    """To the last bit, with its own parameters in place, without gradients."""
    own = all(isinstance(p, nn.Parameter) and p.is_leaf and p.grad is None for p in module.parameters())
    recording = all(m.track_running_stats for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    return own and recording and all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
