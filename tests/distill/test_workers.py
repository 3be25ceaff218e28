"""Several processes that train one network, each on its share of every batch, against one that has all of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import workers_cases
from hintsearch.distill.batches import batch_bounds
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.workers import ALONE, Workers
from hintsearch.models.errors import InputError
from workers_cases import Case, cases, run

NAMES = sorted(cases(Path("/tmp")))
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What comes of each case in this process."""
    return {name: run(case) for name, case in cases(folder).items()}


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, folder: Path, alone: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """What comes of each case in each of several processes."""
    (folder / "meeting").unlink(missing_ok=True)
    command = [sys.executable, workers_cases.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(request.param), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_workers_train_as_one_does_that_has_the_whole_batch(
    name: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    ours, theirs = together[0][name], alone[name]
    assert ours["normalisers"] == pytest.approx(theirs["normalisers"], rel=CLOSE)
    for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        # Losses such as pkt are sums of terms that all but cancel: they are rounded more than the weights.
        assert one == pytest.approx(other, rel=10 * CLOSE, abs=CLOSE)
    for key, value in theirs["student"].items():
        torch.testing.assert_close(ours["student"][key], value, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_all_workers_have_the_very_same_student(name: str, together: list[dict[str, Any]]) -> None:
    first = together[0][name]
    for other in together[1:]:
        assert first["metrics"] == other[name]["metrics"]
        assert all(torch.equal(value, other[name]["student"][key]) for key, value in first["student"].items())


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("images", [8, 11, 64])
def test_shares_are_consecutive_and_all_of_the_batch(size: int, images: int) -> None:
    batch = torch.arange(images)
    shares = [Workers(rank, size).share(batch) for rank in range(size)]
    assert torch.equal(torch.cat(shares), batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_last_batch_has_two_images_for_each_worker() -> None:
    assert batch_bounds(65, 20, Workers(0, 2)) == [(0, 20), (20, 40), (40, 60), (60, 65)]
    assert batch_bounds(63, 20, Workers(0, 2)) == [(0, 20), (20, 40), (40, 63)]
    assert batch_bounds(63, 20, ALONE) == [(0, 20), (20, 40), (40, 60), (60, 63)]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"batch_norm": "batch"}, "recipe.batch_norm is 'batch', whose .* on GPUs only; use share or frozen"),
        ({"batch_size": 3}, "recipe.batch_size is 3, but 2 workers need two images each; raise it to at least 4"),
    ],
)
def test_what_workers_cannot_do_is_one_line(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(Case(HintConfiguration(), recipe), Workers(0, 2))


def test_batch_statistics_of_one_worker_are_those_of_its_batch() -> None:
    ours, theirs = (run(Case(HintConfiguration(), {"batch_norm": kind})) for kind in ("batch", "share"))
    assert ours["metrics"] == theirs["metrics"]


def test_frozen_batch_norms_keep_their_statistics(alone: dict[str, Any]) -> None:
    statistics = {key: value for key, value in alone["labels"]["student"].items() if "running" in key}
    assert statistics
    assert all(torch.equal(value, torch.full_like(value, "var" in key)) for key, value in statistics.items())
