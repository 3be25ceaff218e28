"""A trial whose device is full, run by Tune as in a search."""

from collections.abc import Callable
from pathlib import Path

import pytest
from full_device import FullDevice
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.recipe import Recipe
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.events import Suggested, TrialHistory
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog
from hintsearch.search.networks import TrainedNetwork, as_arrays
from hintsearch.search.scheduler import RungScheduler
from hintsearch.search.study import Study
from hintsearch.search.trial import TrialContext, run_trial, tune_config
from ray import tune
from torch import nn

pytestmark = [pytest.mark.usefixtures("shared_ray")]

RunTrial = Callable[[], TrialHistory]


@pytest.fixture
def device(tmp_path: Path) -> FullDevice:
    return FullDevice(tmp_path / "device")


@pytest.fixture
def run(
    device: FullDevice,
    splits: DataSplits,
    teacher_spec: ModelSpec,
    teacher_network: nn.Module,
    suggested: Callable[..., Suggested],
    digits: Study,
    log: SearchLog,
    tmp_path: Path,
) -> RunTrial:
    """Runs the trial of a control without hints for three epochs, in batches of 32 images; what the journal has."""
    teacher = TrainedNetwork(teacher_spec, as_arrays(teacher_network.state_dict()))
    recipe = Recipe(batch_size=32, crop_padding=1)
    context = TrialContext(device.network("normed"), teacher, splits, recipe, (3,), None, Execution(), 1, 1000.0)

    def make() -> TrialHistory:
        trial = suggested(1, "no_distillation")
        log.record(trial)
        tune.Tuner(
            tune.with_parameters(run_trial, context=context),
            param_space=tune_config(trial, None),
            tune_config=tune.TuneConfig(scheduler=RungScheduler(log, digits, FailureBudget(5))),
            run_config=tune.RunConfig(name="one", storage_path=str(tmp_path / "tune"), verbose=0),
        ).fit()
        return log.history.trials[1]

    return make


def test_trial_that_runs_out_of_memory_goes_on_and_reports_it(device: FullDevice, run: RunTrial) -> None:
    # The second epoch's first step is the sixth.
    device.holds(16, after=5)
    reports = run().reports
    assert [report.metrics.get("accumulation_steps") for report in reports.values()] == [None, 2.0, 2.0]


def test_trial_that_runs_out_of_memory_in_halves_fails_with_one_line(device: FullDevice, run: RunTrial) -> None:
    device.holds(8)
    finished = run().finished
    assert finished is not None
    assert finished.outcome == "failed"
    assert finished.error is not None
    assert finished.error.startswith(
        "the training ran out of device memory: a batch of 32 images does not fit in halves of 16 either ("
    )
    assert "\n" not in finished.error
