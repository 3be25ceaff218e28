"""Gram matrices of many layers at once, and the unbiased alignment of all their pairs by one multiplication."""

import torch
from torch import Tensor

# An HSIC below this is that of a layer without spread, for Gaussian Grams, whose entries are at most 1.
SMALLEST_ALIGNMENT = 1e-16
# Of a squared distance, in units of the last place of the squares it was subtracted from.
_ROUNDING = 64


def linear_gram(features: Tensor) -> Tensor:
    """X Xᵀ of the features less their mean; [n, ...] → [n, n].

    The unbiased HSIC is the same with or without the mean, which would only cost digits.
    """
    flat = features.flatten(1)
    flat = flat - flat.mean(dim=0)
    return flat @ flat.t()


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

    Each Gram is centred once (U-centring, Székely & Rizzo 2014); the estimator of a pair is then an inner product, and
    all pairs are one matrix multiplication.

    Args:
        grams: [L, n, n] symmetric, n ≥ 4; overwritten.

    Returns:
        [L, L], an inner product: never below 0 on the diagonal.

    Raises:
        ValueError: n < 4.
    """
    size = grams.shape[1]
    if size < 4:
        raise ValueError(f"the unbiased HSIC needs minibatches of at least 4 images, but there are {size}")
    grams.diagonal(dim1=1, dim2=2).zero_()
    rows = grams.sum(dim=2) / (size - 2)
    totals = rows.sum(dim=1) / (size - 1)
    grams -= rows[:, :, None]
    grams -= rows[:, None, :]
    grams += totals[:, None, None]
    grams.diagonal(dim1=1, dim2=2).zero_()
    flat = grams.flatten(1)
    return flat @ flat.t() / (size * (size - 3))
