"""How far hint points depend on the images that the layer metrics were measured on."""

from dataclasses import replace

import numpy as np

from .clustering import Clustering
from .hint_selection import CONTROL_SELECTORS, SELECTORS, HintSelection
from .layer_distances import LayerDistances


def with_stability(distances: LayerDistances, selection: HintSelection) -> HintSelection:
    """The selection with its stability, see `stability`."""
    return replace(selection, stability=stability(distances, selection))


def stability(distances: LayerDistances, selection: HintSelection) -> float | None:
    """How far the clusters depend on the images: mean adjusted Rand index (Hubert & Arabie 1985) over the bootstraps.

    Each bootstrap's distances are combined and clustered as the selection was, with the same K. With one cluster, or as
    many as candidates, there is only one partition, and the index is 1.

    Args:
        distances: those that the selection was made from.
        selection: of `select_hints` or `select_control`.

    Returns:
        At most 1; None if no bootstraps were drawn, or for a control selector, which does not look at the images.

    Raises:
        InputError: a metric whose bootstraps were not drawn.
    """
    if selection.selector in CONTROL_SELECTORS:
        return None
    weights = dict(zip(selection.metrics, selection.weights, strict=True)) if selection.weights else None
    bootstraps = distances.combined_bootstraps(selection.metrics, weights)
    if not len(bootstraps):
        return None
    # scikit-learn takes a second to import, which every command of the command line would pay.
    from sklearn.metrics import adjusted_rand_score

    select = SELECTORS.get(selection.selector)
    labels = _clustering(selection).labels()
    again = [tuple(select(bootstrap, len(selection.indices)).labels()) for bootstrap in bootstraps]
    # Many are equal, and a comparison takes a millisecond of what each suggestion may take.
    agreement = {other: adjusted_rand_score(labels, other) for other in set(again)}
    return float(np.mean([agreement[other] for other in again]))


def _clustering(selection: HintSelection) -> Clustering:
    return Clustering(
        tuple(index - 1 for index in selection.indices),
        tuple(tuple(index - 1 for index in own) for own in selection.clusters),
    )
