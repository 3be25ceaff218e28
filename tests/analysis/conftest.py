from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hintsearch.analysis.layer_statistics import LayerSums, Matrix, sums_of_rows
from hintsearch.models.candidates import Candidate, list_candidates
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.tracking import connect
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

SumsOf = Callable[..., LayerSums]


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., Matrix]:
    """Rows in the column order of `LayerSums`: features of each layer, their squared norms, one-hot labels."""

    def make(layers: Sequence[Matrix], labels: NDArray[np.int64], classes: int) -> Matrix:
        norms = [np.square(layer).sum(axis=1, keepdims=True) for layer in layers]
        return np.concatenate([*layers, *norms, np.eye(classes)[labels]], axis=1)

    return make


@pytest.fixture(scope="session")
def sums_of(rows_of: Callable[..., Matrix]) -> SumsOf:
    """Sums over features of layers [N, C_l]; two alternating classes if no labels are given."""

    def make(layers: Sequence[Matrix], labels: NDArray[np.int64] | None = None, classes: int = 2) -> LayerSums:
        given = np.arange(len(layers[0])) % classes if labels is None else labels
        return sums_of_rows(rows_of(layers, given, classes), tuple(layer.shape[1] for layer in layers), classes)

    return make


@pytest.fixture(scope="session")
def candidates_of() -> Callable[[str], tuple[Candidate, ...]]:
    """The candidates of a network of the zoo for images of 1×8×8."""

    def make(name: str) -> tuple[Candidate, ...]:
        return list_candidates(build_model(ModelSpec(name, 10, 1)), (1, 8, 8))

    return make


@pytest.fixture(scope="session")
def resnet8(candidates_of: Callable[[str], tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """3 candidates, one a stage."""
    return candidates_of("resnet8")


@pytest.fixture(scope="session")
def resnet20(candidates_of: Callable[[str], tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """9 candidates, 3 a stage."""
    return candidates_of("resnet20")


@pytest.fixture(scope="session")
def resnet56(candidates_of: Callable[[str], tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """27 candidates, 9 a stage."""
    return candidates_of("resnet56")


@pytest.fixture(scope="session")
def made_up() -> Callable[..., tuple[Candidate, ...]]:
    """Candidates of a network whose stages have so many blocks each."""

    def make(*blocks: int) -> tuple[Candidate, ...]:
        stages = [stage for stage, count in enumerate(blocks) for _ in range(count)]
        return tuple(
            Candidate(f"layer{stage}.{i}", i + 1, 4 * 2**stage, 32 >> stage, 32 >> stage, 0)
            for i, stage in enumerate(stages)
        )

    return make


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """On the sqlite store of the test session: creating one takes seconds, so each test has experiments of its own."""
    return connect(f"sqlite:///{tmp_path_factory.getbasetemp() / 'mlflow.db'}", create=True)
