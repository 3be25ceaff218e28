import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Before Ray and MLflow are imported, which read them then.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import numpy as np
import pytest
import ray
import torch
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.models.candidates import list_candidates
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.events import Event, Suggested, event_from_dict, event_to_dict
from hintsearch.search.journal import SearchLog
from hintsearch.search.layers import Layers
from hintsearch.search.preparation import Preparation, study_data
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study, load_study
from hintsearch.search.teacher import Teacher
from hintsearch.search.tracking import connect
from hintsearch.search.trial import HintResolver
from mlflow.tracking import MlflowClient

METRICS = ("r2_cca", "cka_linear", "effective_rank", "class_separation")


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    # Without an address Ray would join a cluster that somebody else has on this machine.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """On the sqlite store of the test session: creating one takes seconds, so each test has experiments of its own."""
    return connect(f"sqlite:///{tmp_path_factory.getbasetemp() / 'mlflow.db'}", create=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HINTSEARCH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def digits() -> Study:
    """The study that ships with hintsearch (four metrics, an optional logit loss), with rungs 8 and 24."""
    return load_study("digits", ["budget.rungs=[8, 24]"])


@pytest.fixture(scope="session")
def studied() -> Callable[..., Study]:
    """The digits study with other `KEY=VALUE`s."""
    return lambda *overrides: load_study("digits", ["budget.rungs=[8, 24]", *overrides])


@pytest.fixture(scope="session")
def resolver() -> HintResolver:
    """Of resnet20 for resnet8, on random layer metrics."""
    rng = np.random.default_rng(0)
    teacher, student = (list_candidates(build_model(ModelSpec(m, 10, 1)), (1, 8, 8)) for m in ("resnet20", "resnet8"))
    halves = [np.triu(rng.random((len(teacher), len(teacher))), 1) for _ in METRICS]
    matrices = {name: half + half.T for name, half in zip(METRICS, halves, strict=True)}
    distances = LayerDistances(tuple(c.path for c in teacher), matrices, {}, 100)
    return HintResolver(teacher, student, distances, seed=0)


@pytest.fixture(scope="session")
def preparation(digits: Study, resolver: HintResolver) -> Preparation:
    """What a search of digits stands on, with an untrained teacher."""
    spec = ModelSpec("resnet20", 10, 1)
    weights = build_model(spec).state_dict()
    teacher = Teacher(spec, weights, weights_sha256(weights), Path("/storage/teacher.safetensors"), 0.95)
    return Preparation(study_data(digits), teacher, Layers(resolver.teacher, resolver.distances), resolver.student)


@pytest.fixture(scope="session")
def suggest(resolver: HintResolver) -> Callable[..., Suggested]:
    """The suggestion of a new trial by a sampler, as the searcher journals it; the sampler has not heard of it yet."""

    def make(sampler: ArmSampler, number: int, control: str = "") -> Suggested:
        parameters, distributions = sampler.suggest(number, control)
        hints, selection = resolver.resolve(number, control, parameters)
        arm = "control" if control else "search"
        chosen = asdict(selection) if selection else {}
        return Suggested(number, arm, control, parameters, distributions, hints.to_dict(), chosen)

    return make


@pytest.fixture(scope="session")
def suggested(digits: Study, suggest: Callable[..., Suggested]) -> Callable[..., Suggested]:
    """The first suggestion of a fresh sampler, under any number, as a journal gives it back: with lists for tuples."""

    def make(number: int, control: str = "", **changes: Any) -> Suggested:
        live = replace(suggest(ArmSampler(digits, "any", 3), number, control), **changes)
        journaled = event_from_dict(json.loads(json.dumps(event_to_dict(live))))
        assert isinstance(journaled, Suggested)
        return journaled

    return make


@pytest.fixture
def log(tmp_path: Path) -> SearchLog:
    return SearchLog(tmp_path / "journal.jsonl")


@pytest.fixture
def record_all() -> Callable[..., None]:
    """Records events one after the other."""

    def record(log: SearchLog, *events: Event) -> None:
        for event in events:
            log.record(event)

    return record


@pytest.fixture(scope="session")
def teacher_spec() -> ModelSpec:
    return ModelSpec("resnet8", 3, 1, width=0.5)


@pytest.fixture(scope="session")
def teacher_network(teacher_spec: ModelSpec) -> torch.nn.Module:
    """A residual network for `splits` whose batch norms know some data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(teacher_spec).train()
        with torch.no_grad():
            network(torch.randn(64, 1, 8, 8))
        return network.eval()


@pytest.fixture(scope="session")
def splits() -> DataSplits:
    """150 training and 30 validation images of 1×8×8 in three classes."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (3, 1, 8, 8))

    def draw(count: int) -> ImageSet:
        labels = rng.permutation(np.arange(count, dtype=np.int64) % 3)
        return ImageSet((patterns[labels] + rng.integers(0, 56, (count, 1, 8, 8))).astype(np.uint8), labels)

    return DataSplits(draw(150), draw(30), None, classes=3, mean=(0.5,), sd=(0.25,))
