from collections.abc import Callable

import pytest
from hintsearch.models.candidates import Candidate, list_candidates
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.tracking import connect
from mlflow.tracking import MlflowClient


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
