"""How well a network's embeddings find images of the same class.

Sarridis et al. 2022, arXiv 2205.10003, measure students so: the penultimate features of the training images are the
database, those of the test images the queries.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.errors import InputError, nearest
from ..models.penultimate import evaluating
from .batches import Batch, Batches
from .device_memory import Halving
from .execution import Execution

DISTANCES = ("cosine", "l2")

# Bytes that a ranking may take.
RANKING_MEMORY = 2**30

# The halves of an int64 as it lies in memory.
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
_RECALL_STEPS = 10
# More rows at once were measured slower on a CPU.
_CPU_ROWS = 64


@dataclass(frozen=True)
class RetrievalScores:
    """How good full rankings of a database are, 0..1 each; means over the queries.

    Attributes:
        mean_average_precision: mean of the precisions at the ranks of all relevant items.
        interpolated: mean of the interpolated precisions at the recall levels 0, 0.1, ... 1; each is the greatest
            precision at any recall that is not less. The published mAP.
        precision: by k, the share of relevant items among the first k, or among all if there are fewer.
    """

    mean_average_precision: float
    interpolated: float
    precision: Mapping[int, float]


@torch.no_grad()
def retrieval_scores(
    database: Tensor,
    database_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    distance: str,
    at: tuple[int, ...] = (100,),
    memory: int = RANKING_MEMORY,
) -> RetrievalScores:
    """Ranks the whole database for each query; an item of the query's class is relevant.

    Distances are float32, by matrix products; the means are float64. Items at equal distances keep the database's
    order. Under `cosine`, a vector shorter than 1e-12 is as far from all as orthogonal vectors are from each other.
    Queries of a class that the database has not are left out of the means.

    Args:
        database: [N, D] on any device, N below 2³⁰.
        database_labels: int64 [N].
        queries: [Q, D].
        query_labels: int64 [Q].
        distance: `cosine` or `l2`.
        at: each k of the precisions, 1 or more.
        memory: bytes that the ranking may take besides the vectors and a copy of the database; one query at a time is
            ranked if it is too little. Another memory changes the result by rounding alone.

    Raises:
        InputError: an unknown distance, a k below 1, vectors that are not finite or too long to square, no query of a
            class that the database has.
    """
    if distance not in DISTANCES:
        raise InputError(f"distance is {distance!r}; {nearest(distance, DISTANCES)}")
    if at and min(at) < 1:
        raise InputError(f"at holds {min(at)}, but a precision is that of the first k items; choose k from 1")
    space = _Space(database, queries, distance)
    totals = _Totals(at, len(database), database.device)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for relevant, chunk in _chunks(database_labels, query_labels, memory):
            totals.add(_relevant_ranks(space.distances(chunk), relevant, pool))
    return totals.means()


def embeddings(
    model: nn.Module,
    classifier: str,
    data: Batches,
    batch_size: int,
    execution: Execution,
    halving: Halving | None = None,
) -> tuple[Tensor, Tensor]:
    """What a network's classifier takes of each image, in eval mode; each module's own mode is restored.

    Args:
        model: the network.
        classifier: the classifier's module path, see `classifier_path`; tokens or pixels that it takes are averaged.
        data: the images, read in order and without augmentation.
        batch_size: images a forward pass.
        execution: how the network runs.
        halving: whether batches are computed in halves; None: only if this runs out of memory.

    Returns:
        Features float32 [N, D] and labels int64 [N], on the device of the data.

    Raises:
        InputError: a classifier that takes no feature of each image, or does not run.
    """
    halving = halving or Halving("the ranking's pass", data.device)
    taken: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        # Of a module that runs several times, the last.
        taken[:] = [_vectors(given, channels_second=isinstance(module, nn.Conv2d))]

    def vectors(batch: Batch) -> Tensor:
        taken.clear()
        with torch.inference_mode(), execution.autocast():
            model(batch.images)
        size = len(batch.labels)
        if not taken or len(taken[0]) != size:
            raise InputError(
                f"the classifier {classifier!r} is given {len(taken[0]) if taken else 'no'} features for {size} "
                "images; let it run once for all of them"
            )
        return taken.pop()

    features, labels, count = torch.empty(0), torch.empty(0, dtype=torch.int64), 0
    with evaluating(model), model.get_submodule(classifier).register_forward_pre_hook(note, with_kwargs=True):
        for batch in data.in_order(batch_size):
            for found in halving.each(batch, vectors):
                if not count:
                    features = torch.empty(len(data), found.shape[1], device=data.device)
                    labels = torch.empty(len(data), dtype=torch.int64, device=data.device)
                features[count : count + len(found)] = found
                count += len(found)
            labels[count - len(batch.labels) : count] = batch.labels
    # Fewer than the data's length where images could not be read.
    return features[:count], labels[:count]


def retrieval(
    model: nn.Module,
    classifier: str,
    database: Batches,
    queries: Batches,
    batch_size: int,
    execution: Execution,
    at: tuple[int, ...] = (100,),
    halving: Halving | None = None,
) -> dict[str, float]:
    """How well a network's penultimate features find images of the same class, by both distances.

    Args:
        model: the network.
        classifier: the classifier's module path, see `classifier_path`.
        database: the images that are ranked.
        queries: the images that they are ranked for.
        batch_size: images a forward pass.
        execution: how the network runs.
        at: each k of the precisions.
        halving: whether batches are computed in halves; None: only if this runs out of memory.

    Returns:
        `map_cosine`, `map_l2`, `map11_cosine`, `map11_l2` (interpolated), and for each k such as `precision_at_100_l2`;
        see `RetrievalScores`.

    Raises:
        InputError: as `embeddings` and `retrieval_scores`.
    """
    ranked = embeddings(model, classifier, database, batch_size, execution, halving)
    asked = embeddings(model, classifier, queries, batch_size, execution, halving)
    # Of its memory, not of a batch.
    ranking = Halving("the ranking", database.device)

    def scored(distance: str) -> RetrievalScores:
        return retrieval_scores(*ranked, *asked, distance, at, RANKING_MEMORY // ranking.parts)

    found: dict[str, float] = {}
    for distance in DISTANCES:
        scores = ranking.run(len(asked[0]), partial(scored, distance))
        found[f"map_{distance}"] = scores.mean_average_precision
        found[f"map11_{distance}"] = scores.interpolated
        found |= {f"precision_at_{k}_{distance}": share for k, share in scores.precision.items()}
    return found


def _vectors(given: Tensor, channels_second: bool) -> Tensor:
    """What a classifier takes → float32 [B, D], the mean over pixels [B, D, H, W] or tokens [B, ..., D]."""
    inner = tuple(range(2, given.dim())) if channels_second else tuple(range(1, given.dim() - 1))
    return (given.float().mean(dim=inner) if inner else given).to(torch.float32, copy=True)


class _Space:
    """Distances between queries and the whole database, each by one matrix product."""

    def __init__(self, database: Tensor, queries: Tensor, distance: str) -> None:
        self._by_angle = distance == "cosine"
        items, self._queries = database.float(), queries.float()
        squares, self._squares = torch.linalg.vecdot(items, items), torch.linalg.vecdot(self._queries, self._queries)
        if not (2 * (squares.amax() + self._squares.amax())).isfinite():
            raise InputError("an embedding is not finite, or too long to square; train the network anew")
        width = items.shape[1]
        # Written in place: the database may be great.
        columns = items.new_ones(len(items), width + (1 if self._by_angle else 2))
        if self._by_angle:
            torch.div(items, -_lengths(squares), out=columns[:, :width])
        else:
            torch.mul(items, -2, out=columns[:, :width])
            columns[:, width] = squares
        self._columns = columns.T

    def distances(self, chunk: Tensor) -> Tensor:
        """From the queries `chunk` [q] → float32 [q, N]: 1 - cosine, or squared; by rounding it may be just below 0."""
        rows, squares = self._queries[chunk], self._squares[chunk]
        one = rows.new_ones(len(rows), 1)
        if self._by_angle:
            return torch.cat([rows / _lengths(squares), one], dim=1) @ self._columns
        return torch.cat([rows, one, squares[:, None]], dim=1) @ self._columns


def _lengths(squares: Tensor) -> Tensor:
    """Squared lengths [N] → [N, 1], what to divide vectors by to give them length 1; zero vectors stay so."""
    return squares.sqrt().clamp(min=1e-12)[:, None]


class _Totals:
    """Adds up what the rankings give, on their device."""

    def __init__(self, at: tuple[int, ...], items: int, device: torch.device) -> None:
        self._at, self._items = at, items
        self._sums = torch.zeros(2 + len(at), dtype=torch.float64, device=device)
        self._queries = 0

    def add(self, ranks: Tensor) -> None:
        """The 0-based ranks [q, R], ascending, of the relevant items of q queries."""
        relevant = ranks.shape[1]
        precision = torch.arange(1, relevant + 1, dtype=torch.float64, device=ranks.device) / (ranks + 1)
        sums = [precision.mean(dim=1).sum(), _interpolated(precision).sum()]
        sums += [(ranks < k).sum().double() / min(k, self._items) for k in self._at]
        self._sums += torch.stack(sums)
        self._queries += len(ranks)

    def means(self) -> RetrievalScores:
        """Over all queries; an `InputError` if there was none."""
        if not self._queries:
            raise InputError("no query is of a class that the database has; let both hold the same classes")
        exact, interpolated, *precision = (self._sums / self._queries).tolist()
        return RetrievalScores(exact, interpolated, dict(zip(self._at, precision, strict=True)))


def _interpolated(precision: Tensor) -> Tensor:
    """Precisions [q, R] at the ranks of the relevant items → [q], the mean over the recall levels."""
    relevant = precision.shape[1]
    # Level l of 10 needs at least l·R/10 relevant items; at level 0 too, the best precision is that at one of them.
    first = [max(-(-level * relevant // _RECALL_STEPS), 1) - 1 for level in range(_RECALL_STEPS + 1)]
    best = total = torch.zeros_like(precision[:, 0])
    for start, stop in zip(reversed(first), [relevant, *reversed(first[1:])], strict=True):
        if start < stop:
            best = torch.maximum(best, precision[:, start:stop].amax(dim=1))
        total = total + best
    return total / len(first)


def _chunks(database_labels: Tensor, query_labels: Tensor, memory: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries of one class that are ranked together: which items are relevant, bool [N], and their positions [q]."""
    items, device = len(database_labels), database_labels.device
    counts = Counter(database_labels.tolist())
    asked = query_labels.cpu()
    for label in sorted(counts.keys() & set(asked.tolist())):
        # Distances, keys and flags; on a GPU what sorting takes too; then ranks and precisions.
        row_bytes = (16 if device.type == "cpu" else 48) * items + 40 * counts[label]
        rows = max(memory // row_bytes, 1)
        if device.type == "cpu":
            rows = min(rows, _CPU_ROWS)
        relevant = database_labels == label
        for chunk in (asked == label).nonzero().flatten().to(device).split(rows):
            yield relevant, chunk


def _relevant_ranks(distances: Tensor, relevant: Tensor, pool: Executor) -> Tensor:
    """0-based ranks int64 [q, R], ascending, of the R items that are relevant bool [N], by distances [q, N].

    Sorted are int64 keys: the distance, whose bits order as an integer's do where it is not negative, then the item's
    position, then whether it is relevant.
    """
    queries, items = distances.shape
    keys = torch.empty(queries, items, dtype=torch.int64, device=distances.device)
    halves = keys.view(torch.int32).view(queries, items, 2)
    halves[:, :, _HIGH] = distances.view(torch.int32).clamp_(min=0)
    halves[:, :, _LOW] = 2 * torch.arange(items, dtype=torch.int32, device=distances.device) + relevant
    keys = _sorted_rows(keys, pool)
    flags = keys.view(torch.int32).view(queries, items, 2)[:, :, _LOW] & 1
    return (flags.flatten().nonzero() % items).view(queries, -1)


def _sorted_rows(keys: Tensor, pool: Executor) -> Tensor:
    """Keys [q, N], each row sorted; on a CPU in place."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    # NumPy's sort, of one thread, was measured ten times as fast as torch's of two.
    rows = keys.numpy()
    list(pool.map(lambda part: part.sort(axis=1), np.array_split(rows, torch.get_num_threads())))
    return keys
