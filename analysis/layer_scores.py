"""Scores of one candidate. To add one, write a function here with its registration on top.

Each reads `LayerEvidence` and gives a number for the candidate at the 0-based index; as a layer metric it is the
absolute difference of two candidates' numbers.
"""

from collections.abc import Callable

import numpy as np

from ..models.registry import Registry
from .layer_statistics import Matrix
from .measurement import RANK_TOLERANCE, LayerEvidence

ScoreMetric = Callable[[LayerEvidence, int], float]

SCORES: Registry[ScoreMetric] = Registry("layer score")

# Of the linear probe, as a share of the mean variance of a feature.
PROBE_RIDGE = 1e-3


@SCORES.register(
    "activation_norm",
    source="layer statistics as in arXiv 2511.14981",
    kind="score",
    reads="sums",
    range="0..∞",
    direction="none",
    invariances="orthogonal maps",
)
def activation_norm(evidence: LayerEvidence, layer: int) -> float:
    """Mean over the images of ‖x‖, x the pooled features before any projection."""
    return float(evidence.statistics.norms[layer] / evidence.sums.count)


@SCORES.register(
    "sparsity",
    source="Glorot et al. 2011, AISTATS (sparse rectifier activations)",
    kind="score",
    reads="feature maps",
    range="0..1",
    direction="none",
    invariances="permutations, sign flips and scaling of channels",
)
def sparsity(evidence: LayerEvidence, layer: int) -> float:
    """Share of the activations that are 0 before pooling."""
    zeros = evidence.statistics.zeros
    if zeros is None:
        raise ValueError("zeros were not counted")
    candidate = evidence.candidates[layer]
    return float(zeros[layer] / (evidence.sums.count * candidate.channels * candidate.height * candidate.width))


@SCORES.register(
    "dead_channels",
    source="dying rectifiers: Lu et al. 2019, arXiv 1903.06733",
    kind="score",
    reads="sums",
    range="0..1",
    direction="lower uses more of the layer",
    invariances="permutations, sign flips and scaling of channels",
)
def dead_channels(evidence: LayerEvidence, layer: int) -> float:
    """Share of the pooled channels that are 0 for every image."""
    channels = [candidate.channels for candidate in evidence.candidates]
    start = sum(channels[:layer])
    return float(1 - evidence.statistics.fired[start : start + channels[layer]].mean())


@SCORES.register(
    "effective_rank",
    source="Roy & Vetterli 2007, EUSIPCO",
    kind="score",
    reads="sums",
    range="1..channels (0 for a constant layer)",
    direction="none",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def effective_rank(evidence: LayerEvidence, layer: int) -> float:
    """Exponential of the entropy of the normalised singular values of the centred features."""
    singular = np.sqrt(evidence.spectra[layer].eigenvalues)
    return float(np.exp(_entropy(singular))) if len(singular) else 0.0


@SCORES.register(
    "spectral_entropy",
    source="Alter et al. 2000, PNAS 97:10101; as a layer score in arXiv 2511.14981",
    kind="score",
    reads="sums",
    range="0..1",
    direction="higher spreads the variance more evenly",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def spectral_entropy(evidence: LayerEvidence, layer: int) -> float:
    """Entropy of the variance over the principal axes, over its largest value, the logarithm of the columns."""
    columns = evidence.sums.channels[layer]
    return _entropy(evidence.spectra[layer].eigenvalues) / float(np.log(columns)) if columns > 1 else 0.0


@SCORES.register(
    "class_separation",
    source="Fisher 1936: between-class over within-class variance",
    kind="score",
    reads="sums",
    range="0..∞",
    direction="higher separates better",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def class_separation(evidence: LayerEvidence, layer: int) -> float:
    """Between-class scatter over within-class scatter of the features (their traces); 0 for a constant layer."""
    sums = evidence.sums
    total = float(np.trace(sums.cross(layer, layer)))
    if total <= 0:
        return 0.0
    members = sums.mean[sums.labels] * sums.count
    present = members > 0.5
    # Σ over the class's images of (x − mean), [classes, C], from the moment with the one-hot columns.
    deviations = sums.moment[sums.labels, sums.layer(layer)][present]
    between = float((np.square(deviations).sum(axis=1) / members[present]).sum())
    # Classes without inner spread would divide by zero: the ratio is capped where rounding begins.
    within = max(total - between, RANK_TOLERANCE * total)
    return max(between, 0.0) / within


@SCORES.register(
    "linear_probe",
    source="Alain & Bengio 2017, arXiv 1610.01644; here ridge regression on one-hot labels",
    kind="score",
    reads="held-out images",
    range="0..1",
    direction="higher separates better",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def linear_probe(evidence: LayerEvidence, layer: int) -> float:
    """Accuracy of a linear classifier on held-out training images; it is fitted on the sums of the others.

    Ridge regression of the one-hot labels, with a penalty of 10⁻³ of the mean variance of a feature; the largest output
    is the class, the first one on a tie.
    """
    fit, (features, labels) = evidence.fit, evidence.held_out
    if not len(features):
        raise ValueError("no held-out images were gathered")
    columns = fit.layer(layer)
    moment = fit.cross(layer, layer)
    weights: Matrix = np.zeros((len(moment), fit.classes))
    variance = float(np.trace(moment)) / len(moment)
    if variance > 0:
        ridge = PROBE_RIDGE * variance * np.eye(len(moment))
        weights = np.asarray(np.linalg.solve(moment + ridge, fit.moment[columns, fit.labels]), dtype=np.float64)
    outputs = (features[:, columns] - fit.mean[columns]) @ weights + fit.mean[fit.labels]
    return float((outputs.argmax(axis=1) == labels).mean())


@SCORES.register(
    "relative_depth",
    source="index over number of candidates",
    kind="score",
    reads="network",
    range="0..1",
    direction="none",
    invariances="all",
)
def relative_depth(evidence: LayerEvidence, layer: int) -> float:
    """1-based index over L."""
    return evidence.candidates[layer].index / len(evidence.candidates)


@SCORES.register(
    "multiply_adds",
    source="operations of one image",
    kind="score",
    reads="network",
    range="0..1",
    direction="none",
    invariances="all",
)
def multiply_adds(evidence: LayerEvidence, layer: int) -> float:
    """Multiply-adds up to and including the candidate, over those up to the last candidate."""
    last = max(candidate.multiply_adds for candidate in evidence.candidates)
    return evidence.candidates[layer].multiply_adds / last if last else 0.0


def _entropy(values: Matrix) -> float:
    """−Σ p log p of the values as shares, in nats; 0 if there are none."""
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float(-(shares * np.log(shares)).sum())
