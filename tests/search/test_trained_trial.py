"""Trials that are really trained, by real Tune: how they go on after a failure, and how wide their students are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.events import Event, Finished, Reported, Retried, Suggested
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog, read_journal
from hintsearch.search.networks import TrainedNetwork, as_arrays
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.searcher import JournalSearcher
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver, TrialContext, run_trial
from hintsearch.search.tuning import make_tuner
from ray import tune

STUDENT = ModelSpec("resnet8", 3, 1, width=0.25)
RECIPE = Recipe(lr=0.1, batch_size=32, crop_padding=1)
RUNGS = (1, 3)
# It counts its calls in a file, and raises at the one that a second file names.
FLAKY_LOSS = """
from pathlib import Path

CALLS, FATAL = (Path(__file__).with_name(name) for name in ("calls", "fatal"))


def flaky(student, teacher):
    calls = int(CALLS.read_text()) + 1
    CALLS.write_text(str(calls))
    if calls == int(FATAL.read_text()):
        raise RuntimeError("the device went away")
    sizes = [feature.square().mean() for feature in (student, teacher)]
    return (sizes[0] - sizes[1]).square()
"""
# Trial 1 fails once, 2 has another width, 3 none of its own.
FLAKY, WIDE, PLAIN = 1, 2, 3


class Loss:
    """The flaky loss in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{folder / 'losses.py'}:flaky"
        (folder / "losses.py").write_text(FLAKY_LOSS)
        self._calls, self._fatal = folder / "calls", folder / "fatal"
        self.arm(0)

    def arm(self, fatal: int) -> None:
        """Calls are counted anew, and the one of that number raises; 0: none."""
        self._calls.write_text("0")
        self._fatal.write_text(str(fatal))

    @property
    def calls(self) -> int:
        return int(self._calls.read_text())

    @property
    def hints(self) -> HintConfiguration:
        return HintConfiguration((HintPair("layer1.0", "layer1.0", self.name, 1.0),), logit_weight=1.0)


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> Loss:
    return Loss(tmp_path_factory.mktemp("loss"))


@pytest.fixture(scope="module")
def undisturbed(
    loss: Loss, splits: DataSplits, teacher_network: torch.nn.Module
) -> tuple[list[dict[str, float]], list[int]]:
    """The figures of each epoch of trial 1 if nothing fails, and the calls of its loss up to each epoch's end."""
    loss.arm(0)
    teacher = TeacherNetwork(teacher_network)
    trainer = Trainer(STUDENT, splits, RECIPE, RUNGS, Seeds(1, 2), hints=loss.hints, teacher=teacher)
    figures, calls = [], []
    for result in trainer.epochs():
        figures.append(result.metrics)
        calls.append(loss.calls)
    return figures, calls


@pytest.fixture(scope="module")
def tuned(
    shared_ray: None,
    loss: Loss,
    undisturbed: tuple[list[dict[str, float]], list[int]],
    studied: Callable[..., Study],
    resolver: HintResolver,
    splits: DataSplits,
    teacher_spec: ModelSpec,
    teacher_network: torch.nn.Module,
    tmp_path_factory: pytest.TempPathFactory,
) -> SearchLog:
    """The log of a search of three trials; the first one's loss raises in its second epoch, once."""
    overrides = ("budget={trials: 3, retries: 1, rungs: [1, 3]}", "confirm.seeds=0", "controls.trials=0")
    study = studied(*overrides, "resources.concurrent_trials=1")
    log = SearchLog(tmp_path_factory.mktemp("tuned") / "journal.jsonl")
    parameters = {FLAKY: {}, WIDE: {"student.width": 0.5}, PLAIN: {}}
    for number, searched in parameters.items():
        hints = loss.hints if number == FLAKY else HintConfiguration(logit_weight=1.0)
        chosen = {"lr": 0.1, **searched}
        log.record(Suggested(number, "search", "", chosen, {}, hints.to_dict(), {}, data_seed=1, init_seed=2))
    context = TrialContext(
        student=STUDENT,
        teacher=TrainedNetwork(teacher_spec, as_arrays(teacher_network.state_dict())),
        splits=splits,
        recipe=RECIPE,
        rungs=RUNGS,
        start=None,
        execution=Execution(),
        threads=1,
        checkpoint_seconds=1000,
    )
    loss.arm(undisturbed[1][0] + 2)
    failures = FailureBudget(5)
    log.listen(failures)
    searcher = JournalSearcher(log, ArmSampler(study, "any", 3), resolver, study, failures)
    make_tuner(tune.with_parameters(run_trial, context=context), log, study, searcher, failures).fit()
    return log


def events_of(log: SearchLog, number: int, kind: type[Event]) -> list[Event]:
    return [event for event in read_journal(log.path).events if isinstance(event, kind) and event.number == number]


def test_trial_that_raised_is_journaled_as_begun_again_and_as_completed(tuned: SearchLog) -> None:
    assert events_of(tuned, FLAKY, Retried) == [Retried(FLAKY, 1, "RuntimeError: the device went away")]
    assert events_of(tuned, FLAKY, Finished) == [Finished(FLAKY, "completed", "")]


def test_trial_that_raised_has_the_figures_of_an_undisturbed_one(
    tuned: SearchLog, undisturbed: tuple[list[dict[str, float]], list[int]]
) -> None:
    reports = events_of(tuned, FLAKY, Reported)
    assert [report.epoch for report in reports] == [1, 2, 3]
    for report, expected in zip(reports, undisturbed[0], strict=True):
        for name in ("val_accuracy", "val_loss", "train_loss", "loss_hint", "loss_logit"):
            assert report.metrics[name] == expected[name]


def test_trial_that_raised_goes_on_from_its_checkpoint(
    tuned: SearchLog, undisturbed: tuple[list[dict[str, float]], list[int]], loss: Loss
) -> None:
    first, second, whole = undisturbed[1]
    # Two calls of the second epoch were for nothing; then all of a whole training are made but those of an epoch.
    assert loss.calls == first + 2 + whole - (second - first)


@pytest.mark.parametrize(("number", "width"), [(WIDE, 0.5), (PLAIN, 0.25)])
def test_student_is_as_wide_as_its_trial_says(tuned: SearchLog, number: int, width: float) -> None:
    expected = sum(parameter.numel() for parameter in build_model(replace(STUDENT, width=width)).parameters())
    (trained,) = {
        report.metrics["student_parameters"]
        for report in tuned.history.trials[number].reports.values()
        if "student_parameters" in report.metrics
    }
    assert trained == expected
    assert tuned.history.trials[number].finished == Finished(number, "completed", "")
