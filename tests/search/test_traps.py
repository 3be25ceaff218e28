"""Traps of Ray Tune and of the packages around it that no other test holds; each name carries the trap's number."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.execution import Execution
from hintsearch.distill.recipe import Recipe
from hintsearch.models.zoo import ModelSpec
from hintsearch.search import epoch_reports
from hintsearch.search.epoch_reports import EPOCHS, EpochReports
from hintsearch.search.events import Finished
from hintsearch.search.failures import FailureBudget
from hintsearch.search.hardware import trial_execution
from hintsearch.search.journal import SearchLog
from hintsearch.search.networks import TrainedNetwork
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.searcher import JournalSearcher
from hintsearch.search.shared_file import reading, shared
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver, TrialContext, run_trial
from hintsearch.search.tuning import make_tuner
from packaging.requirements import Requirement
from ray import cloudpickle, tune

PRODUCT = ("models", "distill", "analysis", "search", "hintsearch")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def required() -> dict[str, Requirement]:
    """What an installed hintsearch requires, extras left out."""
    found = [Requirement(text) for text in requires("hintsearch") or ()]
    return {requirement.name: requirement for requirement in found if requirement.marker is None}


def sources() -> Iterator[tuple[Path, str]]:
    """The product's own code."""
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).glob("*.py")):
            yield path, path.read_text()


def context_of(pixels: int) -> TrialContext:
    """What trials share, with a data set of so many pixels."""
    images = np.zeros((pixels // 64, 1, 8, 8), np.uint8)
    split = ImageSet(images, np.zeros(len(images), np.int64))
    spec = ModelSpec("resnet8", 2, 1)
    return TrialContext(
        student=spec,
        teacher=TrainedNetwork(spec, {}),
        splits=DataSplits(split, split, None, classes=2, mean=(0.5,), sd=(0.5,)),
        recipe=Recipe(),
        rungs=(1,),
        start=None,
        execution=Execution(),
        threads=1,
        checkpoint_seconds=0,
    )


def test_trap_11_what_tune_sends_with_a_trial_is_small_however_large_the_data_are(tmp_path: Path) -> None:
    with shared(context_of(pixels=20_000_000), tmp_path / "context") as file:
        assert len(cloudpickle.dumps(reading(run_trial, file))) < 100_000


def say_where(config: dict) -> None:
    """A trial of one epoch that reports its process and its threads."""
    torch.set_num_threads(1)
    figures = {"val_accuracy": 0.5, "epoch_seconds": 0.0, "loss_process": float(os.getpid())}
    for epoch in (1, 2):
        tune.report({EPOCHS: [{"epoch": epoch, **figures}]})


@pytest.fixture
def tuned(
    shared_ray: None, log: SearchLog, studied: Callable[..., Study], resolver: HintResolver
) -> Callable[..., tuple[tune.Tuner, SearchLog]]:
    """A Tune experiment as a search makes it, with another trainable."""

    def make(trainable: Callable[[dict], None], *overrides: str) -> tuple[tune.Tuner, SearchLog]:
        study = studied("budget.rungs=[1, 2]", "confirm.seeds=0", "controls.trials=0", *overrides)
        sampler, failures = ArmSampler(study, "any", 3), FailureBudget(study.budget.failures)
        log.listen(sampler)
        log.listen(failures)
        searcher = JournalSearcher(log, sampler, resolver, study, failures)
        return make_tuner(trainable, log, study, searcher, failures), log

    return make


def test_trials_that_cannot_read_what_they_share_end_the_search_and_have_not_failed(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]], tmp_path: Path
) -> None:
    with shared(context_of(pixels=64), tmp_path / "context") as file:
        (tmp_path / "context").unlink()
        tuner, log = tuned(reading(run_trial, file), "resources.concurrent_trials=1")
        tuner.fit()
    (trial,) = log.history.trials.values()
    assert (trial.finished, trial.retries) == (None, 0)


def test_trap_18_trials_follow_each_other_in_the_same_processes(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]],
) -> None:
    tuner, log = tuned(say_where, "budget.trials=8", "resources.concurrent_trials=2")
    tuner.fit()
    trials = log.history.trials.values()
    assert [trial.finished is not None for trial in trials] == [True] * 8
    assert len({report.metrics["loss_process"] for trial in trials for report in trial.reports.values()}) <= 2


def train_fast(config: dict) -> None:
    """A trial of five epochs; at the end of the fourth alone the last report is old, however long they take."""
    torch.set_num_threads(1)
    reports = EpochReports()
    for epoch in (1, 2, 3, 4, 5):
        epoch_reports.REPORT_SECONDS = 0 if epoch == 4 else 3600
        reports.add({"epoch": epoch, "val_accuracy": epoch / 10, "epoch_seconds": 1.0})
        if reports.due or epoch == 5:
            reports.send()


def test_trap_18_epochs_of_a_second_are_one_report(tuned: Callable[..., tuple[tune.Tuner, SearchLog]]) -> None:
    tuner, log = tuned(train_fast, "budget.trials=1", "budget.rungs=[2, 5]")
    (result,) = tuner.fit()
    assert result.metrics is not None
    assert result.metrics["training_iteration"] == 2
    # Tune keeps statistics of every number at the top of a report for as long as it runs.
    assert "val_accuracy" not in result.metrics
    reports = log.history.trials[1].reports
    assert [reports[epoch].metrics["val_accuracy"] for epoch in (1, 2, 3, 4, 5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert log.history.trials[1].finished == Finished(1, "completed", "")


def fail_fast(config: dict) -> None:
    """A trial that breaks before its first epochs are reported."""
    reports = EpochReports()
    for epoch in (1, 2):
        reports.add({"epoch": epoch, "val_accuracy": 0.5, "epoch_seconds": 1.0})
    reports.fail({"failure": "it broke", "traceback": "where"})


def test_epochs_are_reported_before_a_failure(tuned: Callable[..., tuple[tune.Tuner, SearchLog]]) -> None:
    tuner, log = tuned(fail_fast, "budget.trials=1")
    tuner.fit()
    assert list(log.history.trials[1].reports) == [1, 2]
    assert log.history.trials[1].finished == Finished(1, "failed", "it broke", "where")


def test_trap_24_the_folder_of_a_trial_has_a_short_name(tuned: Callable[..., tuple[tune.Tuner, SearchLog]]) -> None:
    tuner, log = tuned(say_where, "budget.trials=1")
    tuner.fit()
    folders = [path.name for path in (log.path.parent / "tune" / "1").iterdir() if path.is_dir()]
    assert len(folders) == 1
    # Tune's default holds every parameter, and can be longer than file systems allow.
    assert len(folders[0]) <= 12


def test_trap_26_as_many_trials_run_at_once_as_the_study_says(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]],
) -> None:
    tuner, log = tuned(say_where, "budget.trials=4", "resources.concurrent_trials=1")
    order: list[tuple[str, int]] = []

    class Recorder:
        def on_event(self, event: object) -> None:
            if type(event).__name__ in ("Suggested", "Finished"):
                order.append((type(event).__name__, event.number))  # type: ignore[attr-defined]

    log.listen(Recorder())
    tuner.fit()
    # The next trial is made while the last one runs, but no third one is.
    running = 0
    for name, _ in order:
        running += 1 if name == "Suggested" else -1
        assert running <= 2
    assert order.count(("Finished", 4)) == 1


def test_trap_25_a_search_that_has_ended_goes_on_in_an_experiment_of_its_own(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]],
) -> None:
    first, log = tuned(say_where, "budget.trials=1")
    first.fit()
    study_of_three = "budget.trials=3"
    second, _ = tuned(say_where, study_of_three)
    second.fit()
    assert sorted(path.name for path in (log.path.parent / "tune").iterdir()) == ["1", "2"]
    assert sorted(log.history.trials) == [1, 2, 3]
    assert log.history.outcomes() == {"completed": 3, "pruned": 0, "failed": 0}


def fails_at_first(config: dict) -> None:
    """Raises after its first checkpoint, and goes on from it when it is begun again."""
    checkpoint = tune.get_checkpoint()
    begun = 1
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            begun = 1 + int((Path(folder) / "epoch").read_text())
    for epoch in range(begun, 3):
        place = Path(os.environ.get("TMPDIR", "/tmp")) / f"hintsearch-trap-{os.getpid()}-{config['number']}"
        place.mkdir(exist_ok=True)
        (place / "epoch").write_text(str(epoch))
        figures = {"epoch": epoch, "val_accuracy": 0.5, "epoch_seconds": 0.0}
        tune.report({EPOCHS: [figures]}, checkpoint=tune.Checkpoint.from_directory(place))
        if checkpoint is None:
            raise RuntimeError("the device went away")


def test_a_trial_that_raises_goes_on_from_its_last_checkpoint(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]],
) -> None:
    tuner, log = tuned(fails_at_first, "budget.trials=1", "budget.retries=1")
    tuner.fit()
    (trial,) = log.history.trials.values()
    assert trial.retries == 1
    assert sorted(trial.reports) == [1, 2]
    assert trial.finished == Finished(1, "completed", "")


def always_fails(config: dict) -> None:
    """Never gets anywhere."""
    raise RuntimeError("the user's layer broke")


def test_a_trial_that_always_raises_fails_with_the_traceback_of_all_attempts(
    tuned: Callable[..., tuple[tune.Tuner, SearchLog]],
) -> None:
    tuner, log = tuned(always_fails, "budget.trials=1", "budget.retries=2")
    tuner.fit()
    (trial,) = log.history.trials.values()
    assert trial.retries == 2
    assert trial.finished is not None
    assert (trial.finished.outcome, trial.finished.error) == ("failed", "RuntimeError: the user's layer broke")
    assert trial.finished.traceback.count("in always_fails") == 3


def test_a_hopeless_search_is_given_up(tuned: Callable[..., tuple[tune.Tuner, SearchLog]]) -> None:
    tuner, log = tuned(
        always_fails, "budget.trials=9", "budget.retries=0", "budget.failures=3", "resources.concurrent_trials=1"
    )
    tuner.fit()
    assert log.history.outcomes()["failed"] == 3
    # One may have been made while the third one failed.
    assert len(log.history.trials) <= 4


@pytest.mark.usefixtures("shared_ray")
def test_trap_19_threads_are_those_of_the_trial_whatever_ray_sets() -> None:
    @ray.remote(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "3"}})
    def threads_in_a_trial() -> int:
        import torch

        context = context_of(pixels=64 * 8)
        # It has no teacher and fails at once, with its threads set.
        with pytest.raises(Exception):  # noqa: B017, PT011
            run_trial({"hints": {}}, context)
        return torch.get_num_threads()

    assert ray.get(threads_in_a_trial.remote()) == 1


@pytest.mark.usefixtures("shared_ray")
def test_trap_20_a_trial_that_asks_for_no_gpu_computes_on_the_cpu(digits: Study) -> None:
    assert trial_execution(digits.resources)[0].device == "cpu"


def test_trap_12_a_trial_s_process_never_imports_mlflow() -> None:
    code = "import hintsearch.search.trial, sys; print('mlflow' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_trap_21_ray_comes_with_its_dashboard_and_job_submission(required: dict[str, Requirement]) -> None:
    assert required["ray"].extras == {"default", "tune"}


def test_trap_22_no_process_reads_images(tmp_path: Path) -> None:
    users = [path.name for path, text in sources() if re.search(r"\bDataLoader\(|import multiprocessing", text)]
    assert users == []


def test_trap_27_mlflow_is_no_exact_version(required: dict[str, Requirement]) -> None:
    assert {str(part) for part in required["mlflow"].specifier} == {">=3.13", "<4"}


def test_trap_28_rays_tokens_are_left_as_they_are() -> None:
    assert [path.name for path, text in sources() if "RAY_AUTH" in text] == []
