"""How well the clusters are apart, and the number of clusters that sets them apart best."""

import numpy as np

from ..models.errors import InputError
from .clustering import TIE_DECIMALS, Clustering, Selector
from .layer_statistics import Matrix


def medoid_silhouette(distances: Matrix, clustering: Clustering) -> float | None:
    """Mean medoid silhouette (Van der Laan, Pollard & Bryan 2003; Lenssen & Schubert 2022, arXiv 2209.12553).

    With a the distance of an item to its own centre and b to the nearest other centre, its value is (b − a)/max(a, b):
    the papers' 1 − a/b where its own centre is the nearest one, and negative where it is not, which the selectors that
    do not assign by centre allow.

    Two conventions are ours. An item alone in its cluster counts 0, as in Rousseeuw's silhouette (1987); the papers
    count it 1, as any centre, and the mean then grows to 1 as K goes to L whatever the distances. An item at distance 0
    from both centres lies in neither more than in the other and counts 0; the papers count it 1.

    Args:
        distances: [L, L], not negative.
        clustering: of the same L items.

    Returns:
        −1..1; None for a single cluster, which has no other centre.
    """
    if len(clustering.centres) == 1:
        return None
    size = len(distances)
    items, labels = np.arange(size), np.array(clustering.labels())
    to_centres = distances[:, list(clustering.centres)]
    own = to_centres[items, labels]
    to_centres[items, labels] = np.inf
    other = to_centres.min(axis=1)
    larger = np.maximum(own, other)
    values = np.divide(other - own, larger, out=np.zeros(size), where=larger > 0)
    values[[members[0] for members in clustering.members if len(members) == 1]] = 0.0
    return float(values.mean())


def choose_clusters(distances: Matrix, selector: Selector, low: int, high: int) -> tuple[int, dict[int, float]]:
    """The number of clusters K with the largest medoid silhouette; the smallest one on a tie.

    Lenssen & Schubert 2023, arXiv 2309.03751, choose K in this way, but optimise the silhouette itself at each K; here
    the selector's own clusterings are compared.

    Args:
        distances: [L, L] symmetric, not negative.
        selector: makes the clusterings.
        low: smallest K to try, at least 2; of L items at most L−1 clusters are tried.
        high: largest K to try.

    Returns:
        K, and for each K tried its silhouette; (1, {}) for L ≤ 2, where no K can be told from another.

    Raises:
        InputError: nothing to try between `low` and `high`.
    """
    size = len(distances)
    if size <= 2:
        return 1, {}
    highest = min(high, size - 1)
    if not 2 <= low <= highest:
        raise InputError(
            f"the numbers of clusters to try are {low}..{high}, but must lie in 2..{size - 1} for {size} layers; "
            "choose others"
        )
    found = {
        clusters: medoid_silhouette(distances, selector(distances, clusters)) for clusters in range(low, highest + 1)
    }
    values = {clusters: value for clusters, value in found.items() if value is not None}
    best = max(values, key=lambda clusters: (round(values[clusters], TIE_DECIMALS), -clusters))
    return best, values
