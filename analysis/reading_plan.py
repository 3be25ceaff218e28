"""Which images are read together, on how many columns, and what memory that takes: fixed before anything starts.

Nothing here depends on the number of actors, so that neither does the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..distill.seeding import derived_seed
from ..models.errors import InputError
from .layer_statistics import Matrix

GROUPS = 16
ANCHORS = 256
# The unbiased estimator of a minibatch needs so many images.
SMALLEST_MINIBATCH = 4
# Matrices on the driver besides one a group: merged runs, chunks that wait for an earlier one, a bootstrap.
_DRIVER_MATRICES = GROUPS + 8
# In an actor: the matrix, the temporary that makes it, and its copy on the way to the driver.
_ACTOR_MATRICES = 3
_FLOAT = 8


@dataclass(frozen=True)
class Chunk:
    """Images that one actor reads in one call: a Gram minibatch, and the unit of recovery.

    Attributes:
        start: first image.
        stop: one past the last image.
        group: 0-based, of all its images.
        anchors: how many of its first images are anchors.
    """

    start: int
    stop: int
    group: int
    anchors: int


@dataclass(frozen=True)
class ReadingPlan:
    """How N images are cut.

    Attributes:
        images: N.
        groups: G neighbouring groups of equal size, over which bootstraps are drawn.
        held_out: how many of the last groups the linear probe is tested on.
        chunks: in order; none crosses a group.
    """

    images: int
    groups: int
    held_out: int
    chunks: tuple[Chunk, ...]

    def is_held_out(self, group: int) -> bool:
        """Whether the linear probe is tested on that group."""
        return group >= self.groups - self.held_out


def plan_reading(images: int, chunk: int) -> ReadingPlan:
    """Cuts N images into up to 16 groups, and these evenly into chunks.

    Args:
        images: N, at least 1; they are taken to be in random order.
        chunk: the most images of a chunk.
    """
    groups = max(1, min(GROUPS, images // SMALLEST_MINIBATCH))
    edges = [group * images // groups for group in range(groups + 1)]
    anchors = -(-min(ANCHORS, images) // groups)
    chunks: list[Chunk] = []
    for group, (first, last) in enumerate(pairwise(edges)):
        parts = -(-(last - first) // chunk)
        cuts = [first + part * (last - first) // parts for part in range(parts + 1)]
        for start, stop in pairwise(cuts):
            chunks.append(Chunk(start, stop, group, max(0, min(stop, first + anchors) - start)))
    return ReadingPlan(images, groups, max(1, groups // 8) if groups > 1 else 0, tuple(chunks))


@dataclass(frozen=True)
class Columns:
    """The columns of a row of `LayerSums`.

    Attributes:
        channels: pooled channels of each candidate.
        widths: feature columns of each candidate; fewer than its channels where they are projected.
        classes: number of one-hot columns.
        seed: of the projections.
    """

    channels: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    seed: int

    @property
    def total(self) -> int:
        """D, with the norm and label columns."""
        return sum(self.widths) + len(self.widths) + self.classes

    @property
    def projected(self) -> int:
        """How many candidates are projected."""
        return sum(width < channels for width, channels in zip(self.widths, self.channels, strict=True))

    def projection(self, layer: int) -> Matrix | None:
        """A Gaussian random projection [C, width] of the 0-based candidate, by seed; None if it keeps its channels.

        Inner products are kept up to a relative error of about 1/√width (Johnson & Lindenstrauss 1984).
        """
        channels, width = self.channels[layer], self.widths[layer]
        if width == channels:
            return None
        rng = np.random.default_rng(derived_seed("projection", self.seed, layer))
        return np.asarray(rng.standard_normal((channels, width)) / np.sqrt(width))


@dataclass(frozen=True)
class Memory:
    """What the sums take, in bytes, beside the network itself.

    Attributes:
        actor: of each actor.
        driver: of the process that merges.
    """

    actor: int
    driver: int


def plan_columns(channels: Sequence[int], classes: int, chunk: int, limit: float, seed: int) -> Columns:
    """Keeps all channels if the sums fit into the memory; else the widest candidates are projected to one width.

    Args:
        channels: of each candidate.
        classes: number of one-hot columns.
        chunk: the most images of a chunk.
        limit: bytes that the sums may take, in an actor and on the driver.
        seed: of the projections.

    Raises:
        InputError: even one column a candidate would take more.
    """

    def capped(width: int) -> Columns:
        return Columns(tuple(channels), tuple(min(count, width) for count in channels), classes, seed)

    # One by one: where the cap reaches a candidate's channels, its projection is saved and the memory falls.
    for width in range(max(channels), 0, -1):
        if _fits(capped(width), chunk, limit):
            return capped(width)
    needed = max(sums_memory(capped(1), chunk).__dict__.values())
    raise InputError(
        f"layers.memory_gb is {limit / 1e9:g}, but the sums of {len(channels)} candidates and {classes} classes "
        f"take at least {needed / 1e9:.3g}; raise it, or name fewer layers.candidates"
    )


def sums_memory(columns: Columns, chunk: int) -> Memory:
    """About what the sums take at their most."""
    matrix = columns.total**2 * _FLOAT
    pooled = chunk * (sum(columns.channels) + 2 * columns.total) * _FLOAT
    # A Gaussian Gram a candidate, and one more while it is made.
    grams = (len(columns.channels) + 2) * chunk**2 * _FLOAT
    projections = sum(
        count * width * _FLOAT for count, width in zip(columns.channels, columns.widths, strict=True) if width < count
    )
    return Memory(_ACTOR_MATRICES * matrix + pooled + grams + projections, _DRIVER_MATRICES * matrix)


def _fits(columns: Columns, chunk: int, limit: float) -> bool:
    memory = sums_memory(columns, chunk)
    return max(memory.actor, memory.driver) <= limit
