"""Gram matrices of many layers at once, and the unbiased alignment of all their pairs by one multiplication."""

from collections.abc import Sequence

import torch
from torch import Tensor

# An HSIC below this is that of a layer without spread: rounding, for Gaussian Grams, whose entries are at most 1.
SMALLEST_ALIGNMENT = 1e-12
# Of a squared distance, in units of the last place of the squares it was subtracted from.
_ROUNDING = 64


def linear_grams(features: Sequence[Tensor]) -> Tensor:
    """X Xᵀ of every layer's features less their mean, stacked; [n, ...] each → [L, n, n].

    The unbiased HSIC is the same with the mean, which would only cost it digits.
    """
    size = len(features[0])
    half = size // 2
    grams = features[0].new_empty(len(features), size, size)
    for feature, gram in zip(features, grams, strict=True):
        flat = feature.flatten(1)
        flat = flat - flat.mean(dim=0)
        if flat.shape[1] <= size:
            torch.mm(flat, flat.t(), out=gram)
            continue
        # A quarter of a large symmetric product is worth copying.
        torch.mm(flat[:half], flat[:half].t(), out=gram[:half, :half])
        torch.mm(flat[half:], flat.t(), out=gram[half:])
        gram[:half, half:] = gram[half:, :half].t()
    return grams


def gaussian_gram(features: Tensor, bandwidth: float) -> Tensor:
    """exp(−‖x_i − x_j‖² / (2·bandwidth²)); [n, C] → [n, n]."""
    return squared_distances(features).mul_(-0.5 / bandwidth**2).exp_()


def median_distance(features: Tensor) -> float:
    """The median Euclidean distance between two rows of [n, C] that differ; 1 if there are none.

    Equal rows are left out because of rectified layers, where most may be 0: their median would be no scale.
    """
    squares = squared_distances(features)
    rows, columns = torch.triu_indices(len(features), len(features), 1, device=features.device)
    distances = squares[rows, columns].sqrt()
    distances = distances[distances > 0]
    # Of an even number, torch takes the lower of the two in the middle.
    return float(distances.median() - (-distances).median()) / 2 if len(distances) else 1.0


def squared_distances(features: Tensor) -> Tensor:
    """‖x_i − x_j‖² between all rows, never below 0 and 0 on the diagonal; [n, C] → [n, n]."""
    # From the first row, so that a large common offset does not cancel.
    steps = features - features[0]
    squares = steps.square().sum(dim=1)
    scale = squares[:, None] + squares[None, :]
    distances = torch.addmm(scale, steps, steps.t(), alpha=-2.0)
    # Equal rows differ by rounding only, which must not become a distance (or the median of them) of its own.
    rounding = _ROUNDING * torch.finfo(features.dtype).eps
    return distances.masked_fill_(distances <= rounding * scale, 0).fill_diagonal_(0)


def stacked_hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs of layers (Song et al. 2012, JMLR 13; Nguyen et al. 2021, arXiv 2010.15327).

    With the diagonals 0, n(n−3)·HSIC = Σ K_ij L_ij + ΣK·ΣL/((n−1)(n−2)) − 2/(n−2)·Σ_i (ΣK_i)(ΣL_i): the first term of
    all pairs is one matrix multiplication, and the others need the sums of the rows only.

    Args:
        grams: [L, n, n] symmetric, n ≥ 4, float64 unless the Grams are centred; their diagonals are set to 0.

    Returns:
        [L, L], an inner product: below 0 on the diagonal by rounding only.

    Raises:
        ValueError: n < 4.
    """
    size = grams.shape[1]
    if size < 4:
        raise ValueError(f"the unbiased HSIC needs minibatches of at least 4 images, but there are {size}")
    grams.diagonal(dim1=1, dim2=2).zero_()
    rows = grams.sum(dim=2)
    totals = rows.sum(dim=1)
    flat = grams.flatten(1)
    same = flat @ flat.t()
    return (same + torch.outer(totals, totals) / ((size - 1) * (size - 2)) - rows @ rows.t() * (2 / (size - 2))) / (
        size * (size - 3)
    )
