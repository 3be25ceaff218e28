"""What trainings of a small residual student have in common."""

from collections.abc import Iterable

from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import EpochResult, Trainer
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec

STUDENT = ModelSpec("resnet8", 3, 1, width=0.25)
RECIPE = Recipe(lr=0.1, batch_size=16, crop_padding=1)
PAIRS = (HintPair("layer1.0", "layer1.0", "fitnet", 0.5), HintPair("layer3.0", "layer2.0", "at", 2.0))
HINTS = HintConfiguration(pairs=PAIRS, logit_weight=0.4)

_TIMES = ("images_per_second", "warmup_seconds")

Run = tuple[list[dict[str, float]], str]


def figures(results: Iterable[EpochResult]) -> list[dict[str, float]]:
    """All metrics but the times, which no two runs share."""
    return [{name: value for name, value in one.metrics.items() if name not in _TIMES} for one in results]


def trained(trainer: Trainer) -> Run:
    """The figures of all epochs and the hash of the trained weights."""
    results = figures(trainer.epochs())
    return results, weights_sha256(trainer.student.state_dict())
