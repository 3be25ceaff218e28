"""Several processes that train one network together, each on its share of every batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """The processes of torch's default group, as one of them sees them; alone, nothing is communicated.

    Shares are consecutive images in the order of the ranks, so what is gathered is in the order of the batch.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_this_process(cls) -> "Workers":
        """Those of the group that this process is in."""
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Whether there is but this process."""
        return self.size == 1

    def bounds(self, images: int, rank: int | None = None) -> tuple[int, int]:
        """Where the share of a process, this one's unless another's is asked for, starts and stops in a batch."""
        rank = self.rank if rank is None else rank
        return images * rank // self.size, images * (rank + 1) // self.size

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of those of a whole batch [B, ...]; what is a scalar, and of all, stays."""
        return rows if self.alone or rows.dim() == 0 else rows[slice(*self.bounds(len(rows)))]

    def gather(self, share: Tensor, images: int) -> Tensor:
        """The rows of all shares.

        Gradients, and tangents of forward mode, go through it. Every process must ask, and use what it is given.

        Args:
            share: this process's [b, ...].
            images: of the whole batch, B.

        Returns:
            [B, ...].
        """
        if self.alone:
            return share
        gathered: Tensor = _Gather.apply(share, self, images)
        return gathered

    @torch.no_grad()
    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor, of which every process has one, by the sum over the processes."""
        if self.alone:
            return
        for kind in _by_kind(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in kind])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in kind])
            for tensor, piece in zip(kind, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes."""
        if self.alone:
            return
        tensors = list(tensors)
        self.add(tensors)
        for tensor in tensors:
            tensor.div_(self.size)

    @torch.no_grad()
    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by that of the first process."""
        if not self.alone:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds the gradients of what all processes train: one that a parameter lacks here it lacks everywhere."""
        self.add(parameter.grad for parameter in parameters if parameter.grad is not None)

    def add_named(self, tensors: Mapping[str, Tensor]) -> None:
        """`add`, in the order of the names."""
        self.add(tensors[name] for name in sorted(tensors))


ALONE = Workers()


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that can be sent as one."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


class _Gather(torch.autograd.Function):
    """`Workers.gather`: what each process does with the whole counts, so gradients are added over the processes."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, workers: Workers, images: int) -> Tensor:
        ctx.workers, ctx.images = workers, images
        return _rows(share, workers, images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        start, stop = ctx.workers.bounds(ctx.images)
        return whole[start:stop], None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _workers: None, _images: None) -> Tensor:
        return _rows(tangent, ctx.workers, ctx.images)


def _rows(share: Tensor, workers: Workers, images: int) -> Tensor:
    """All shares, one below the other; each is sent in a block of the largest one's size."""
    shares = [workers.bounds(images, rank) for rank in range(workers.size)]
    counts = [stop - start for start, stop in shares]
    block = share.new_zeros(max(counts), *share.shape[1:])
    block[: len(share)] = share
    blocks = [torch.empty_like(block) for _ in counts]
    dist.all_gather(blocks, block)
    return torch.cat([one[:count] for one, count in zip(blocks, counts, strict=True)])
