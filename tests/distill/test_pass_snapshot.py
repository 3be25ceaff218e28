import torch
from hintsearch.distill.pass_snapshot import PassSnapshot
from torch import Tensor, nn

CPU = torch.device("cpu")


class Replacing(nn.Module):
    """Puts a new tensor in its buffer's place in each pass, as some modules do."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen + images.mean()
        return images


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), Replacing(), nn.BatchNorm2d(3)).train()


def state(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run(module: nn.Module) -> None:
    module(torch.randn(4, 3, 2, 2))


def test_buffers_are_as_they_were_when_it_was_taken_last() -> None:
    module = network()
    snapshot = PassSnapshot(module, CPU)
    for _ in range(3):
        run(module)
        before = state(module)
        snapshot.take()
        run(module)
        assert not same(state(module), before)
        snapshot.restore()
        assert same(state(module), before)


def test_it_can_be_restored_twice() -> None:
    module = network()
    snapshot = PassSnapshot(module, CPU)
    snapshot.take()
    before = state(module)
    for _ in range(2):
        run(module)
        snapshot.restore()
        assert same(state(module), before)


def test_generator_draws_the_same_again() -> None:
    snapshot = PassSnapshot(network(), CPU)
    with torch.random.fork_rng():
        snapshot.take()
        first = torch.rand(5)
        snapshot.restore()
        assert torch.equal(torch.rand(5), first)


def test_buffers_that_are_left_out_stay_as_they_are() -> None:
    module = nn.BatchNorm2d(3)
    assert module.running_mean is not None
    snapshot = PassSnapshot(module, CPU, [module.running_mean])
    snapshot.take()
    run(module)
    changed = module.running_mean.clone()
    snapshot.restore()
    assert torch.equal(module.running_mean, changed)
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.item() == 0


def test_without_having_been_taken_it_restores_nothing() -> None:
    module = network()
    run(module)
    before = state(module)
    PassSnapshot(module, CPU).restore()
    assert same(state(module), before)
