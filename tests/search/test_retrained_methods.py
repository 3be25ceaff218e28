"""From a trial with everything at once to its exported file, and back to the very student.

Several losses a pair, one of them somebody's own; penultimate features; a warm-up; dynamic weights; rankings.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.analysis.trials import read_search
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, TeacherNetwork, Trainer
from hintsearch.models.candidates import list_candidates
from hintsearch.models.errors import InputError
from hintsearch.models.own_code import own_code_sha256
from hintsearch.models.weights import save_weights, weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search import retrain
from hintsearch.search.events import Began, Finished, Prepared, Reported, Suggested
from hintsearch.search.export import HintFile, checksum, export_hints, load_hints, write_hints
from hintsearch.search.journal import SearchLog
from hintsearch.search.layers import Layers
from hintsearch.search.mlflow_logger import MlflowLogger
from hintsearch.search.parent_run import search_document
from hintsearch.search.preparation import Preparation, study_data
from hintsearch.search.retrain import code_of_hints, distill_student
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.specs import student_spec
from hintsearch.search.study import Study, load_study
from hintsearch.search.teacher import Teacher
from hintsearch.search.tracking import TrackedSearch
from hintsearch.search.trial import HintResolver
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.usefixtures("cache")

NAME = "methods-20260101-120000"
OWN_LOSS = """
def own(student, teacher):
    # Of each image, so that dynamic weights tell images apart.
    sizes = [feature.square().mean(dim=(1, 2, 3)) for feature in (student, teacher)]
    return (sizes[0] - sizes[1]).square()
"""
CHANGES = [
    "teacher={model: resnet8, width: 0.5}",
    "data.train_fraction=0.2",
    "space.hints.clusters=2",
    "space.weight={hint: 0.5, by_loss: {at: 2}, logit: 0.3, embedding: 0.7, classification: 0}",
    "space.normalise=false",
    "warmup={base_epochs: 0, lr: 0.02}",
    "dynamic_weights={meta_images: 30, meta_batch_size: 10, warmup_fraction: 0}",
    "objective.metric=val_map_cosine",
    "recipe={optimizer: adam, lr: 0.01, batch_size: 32}",
    "budget.rungs=[1, 3]",
]


@dataclass(frozen=True)
class Exported:
    """A trial, and the file of it."""

    path: Path
    own_code: Path
    suggested: Suggested
    metrics: dict[int, dict[str, float]]

    @property
    def hints(self) -> HintFile:
        """As it is read back."""
        return load_hints(self.path)

    @property
    def own(self) -> str:
        """The name of the own loss."""
        return f"{self.own_code}:own"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A name that MLflow takes in no metric's name.
    place = tmp_path_factory.mktemp("methods") / "me@home"
    place.mkdir()
    (place / "mine.py").write_text(OWN_LOSS)
    return place


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return load_study("digits", [*CHANGES, f"space.loss.hint=[{folder}/mine.py:own+at]"])


@pytest.fixture(scope="module")
def preparation(study: Study, folder: Path) -> Preparation:
    """What the search stands on, with an untrained teacher and random layer metrics."""
    spec = ModelSpec("resnet8", 10, 1, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = build_model(spec).state_dict()
    save_weights(folder / "teacher.safetensors", weights)
    teacher = Teacher(spec, weights, weights_sha256(weights), folder / "teacher.safetensors", 0.1)
    splits = study_data(study)
    ours, theirs = (list_candidates(build_model(s), (1, 8, 8)) for s in (student_spec(study, splits), spec))
    rng = np.random.default_rng(0)
    halves = {name: np.triu(rng.random((3, 3)), 1) for name in study.layers.metrics}
    matrices = {name: half + half.T for name, half in halves.items()}
    distances = LayerDistances(tuple(c.path for c in theirs), matrices, {}, 100)
    return Preparation(splits, teacher, Layers(theirs, distances), ours)


@pytest.fixture(scope="module")
def exported(study: Study, preparation: Preparation, folder: Path, client: MlflowClient) -> Exported:
    """A search trial: suggested, trained, logged and exported as a search does it."""
    assert study.warmup
    assert study.dynamic_weights
    resolver = HintResolver(
        preparation.layers.candidates,
        preparation.student,
        preparation.layers.distances,
        study.seed,
        normalise=study.space.normalise,
        warmup=study.warmup.warmup(),
        dynamic_weights=study.dynamic_weights.dynamic_weights(),
    )
    parameters, distributions = ArmSampler(study, NAME, 3).suggest(1, "")
    hints, selection = resolver.resolve(1, "", parameters)
    assert selection is not None
    chosen = asdict(selection)
    suggested = Suggested(1, "search", "", parameters, distributions, hints.to_dict(), chosen, data_seed=3, init_seed=5)
    metrics = _trained(study, preparation, hints)

    tracked = TrackedSearch(client, "methods", NAME, None)
    tracked.tag_parent({"objective": study.objective.metric, "direction": study.objective.direction})
    tracked.add_documents({"search.json": search_document(study, preparation, Execution())})
    log = SearchLog(folder / "journal.jsonl")
    logger = MlflowLogger(tracked, log)
    log.listen(logger)
    log.record(Began(NAME, study.resolved(), "0", client.tracking_uri))
    log.record(Prepared(preparation.teacher.sha256, str(preparation.teacher.path), 0.1))
    log.record(suggested)
    for epoch, found in metrics.items():
        log.record(Reported(1, epoch, found, None))
    log.record(Finished(1, "completed", ""))
    assert logger.close(interrupted=False) == 0
    export_hints(client, read_search(client, NAME), folder / "hints.yaml")
    return Exported(folder / "hints.yaml", folder / "mine.py", suggested, metrics)


def _trained(study: Study, preparation: Preparation, hints: HintConfiguration) -> dict[int, dict[str, float]]:
    """The metrics of a trial by epoch."""
    trainer = Trainer(
        student_spec(study, preparation.splits),
        preparation.splits,
        study.recipe.recipe(),
        study.budget.rungs,
        Seeds(3, 5),
        hints=hints,
        teacher=TeacherNetwork(preparation.teacher.network()),
        rankings=True,
    )
    return {result.epoch: result.metrics for result in trainer.epochs()}


def repeatable(metrics: dict[str, float]) -> dict[str, float]:
    """All but the speed, which no two runs share."""
    return {name: value for name, value in metrics.items() if name not in ("images_per_second", "warmup_seconds")}


def test_trial_is_one_with_everything(exported: Exported) -> None:
    """Else what follows would show less than it says."""
    first, last = exported.metrics[1], exported.metrics[3]
    terms = {"logit", "own.layer1.0", "at.layer1.0", "embedding"}
    assert {f"hint_weight.{term}" for term in terms} <= set(last)
    assert last["hint_weight.logit"] != 1
    assert {"warmup_loss_1", "warmup_loss_2"} <= set(first)
    assert [epoch for epoch, metrics in exported.metrics.items() if "val_map_cosine" in metrics] == [1, 3]


def test_file_holds_the_whole_configuration(exported: Exported) -> None:
    hints = exported.hints.hints
    assert hints.configuration() == HintConfiguration.from_dict(exported.suggested.hints)
    assert [(pair.loss, pair.weight) for pair in hints.pairs] == [(exported.own, 0.5), ("at", 2.0)] * 2
    assert (hints.embedding_weight, hints.normalise, hints.classification_weight) == (0.7, False, 0)
    assert hints.warmup == {
        "loss": "strongest_channels",
        "base_epochs": 0,
        "epochs": [],
        "order": "shallow_to_deep",
        "lr": 0.02,
    }
    assert hints.dynamic_weights is not None
    assert hints.dynamic_weights["meta_batch_size"] == 10


def test_file_knows_the_images_set_aside_and_the_optimizer(exported: Exported) -> None:
    assert exported.hints.data["meta_images"] == 30
    assert exported.hints.training.recipe["optimizer"] == "adam"


def test_file_is_read_back_as_it_was_written(exported: Exported, tmp_path: Path) -> None:
    write_hints(tmp_path / "again.yaml", exported.hints)
    assert load_hints(tmp_path / "again.yaml") == exported.hints


def test_hash_of_an_own_loss_is_recorded(exported: Exported) -> None:
    sha256 = own_code_sha256(exported.own)
    assert exported.hints.hints.loss_code_sha256 == {exported.own: sha256}
    assert code_of_hints(exported.hints) == [("loss", exported.own, sha256)]


@pytest.fixture(scope="module")
def retrained(exported: Exported) -> list[retrain.RetrainedStudent]:
    """Two students, the first with the seeds of the trial."""
    return distill_student(
        exported.hints, seeds=2, output=exported.path.with_name("student.safetensors"), trust_code=True
    )


def test_retrained_student_repeats_the_exported_figure(
    exported: Exported, retrained: list[retrain.RetrainedStudent]
) -> None:
    first, second = retrained
    assert first.validation["val_map_cosine"] == exported.hints.evidence.value == exported.metrics[3]["val_map_cosine"]
    assert repeatable(first.validation) == repeatable(exported.metrics[3])
    assert second.validation["val_map_cosine"] != first.validation["val_map_cosine"]


def test_rankings_of_test_images_are_told_where_rankings_decided(retrained: list[retrain.RetrainedStudent]) -> None:
    rankings = {"map_cosine", "map_l2", "map11_cosine", "map11_l2", "precision_at_100_cosine", "precision_at_100_l2"}
    for student in retrained:
        assert set(student.test) == {"accuracy", "macro_f1", "loss", *rankings}
        assert all(0 < student.test[name] <= 1 for name in rankings)


def test_other_student_gets_each_hint_point_once_with_all_its_losses(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TaughtStudent] = []

    class Watched(GroupTrainer):
        def __init__(self, *args: Any, **named: Any) -> None:
            seen.extend(args[4])
            super().__init__(*args, **named)

    monkeypatch.setattr(retrain, "GroupTrainer", Watched)
    training = exported.hints.training.model_copy(update={"rungs": [1]})
    hints = exported.hints.model_copy(update={"training": training})
    (student,) = distill_student(hints, student="resnet14", output=tmp_path / "other.safetensors", trust_code=True)
    assert "val_map_cosine" in student.validation
    (taught,) = seen
    before = exported.hints.hints.configuration()
    # Blocks 1 and 3 of 3 become 2 and 6 of 6.
    deeper = {"layer1.0": "layer1.1", "layer2.0": "layer2.1", "layer3.0": "layer3.1"}
    assert taught.hints.pairs == tuple(replace(pair, student_layer=deeper[pair.teacher_layer]) for pair in before.pairs)
    assert replace(taught.hints, pairs=before.pairs) == before
    assert len(taught.hints.curriculum) == 2


def test_hint_points_that_ran_backwards_do_so_for_another_student(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported.hints.selection is not None
    selection = exported.hints.selection.model_copy(update={"selector": "reversed"})
    found: list[tuple[str, str, str]] = []

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(*args: Any, **named: Any) -> None:
        found.extend((pair.teacher_layer, pair.student_layer, pair.loss) for pair in args[4][0].hints.pairs)
        raise Stopped

    monkeypatch.setattr(retrain, "GroupTrainer", stop)
    hints = exported.hints.model_copy(update={"selection": selection})
    with pytest.raises(Stopped):
        distill_student(hints, student="resnet14", output=tmp_path / "other.safetensors", trust_code=True)
    losses = [exported.own, "at"]
    assert found == [
        *(("layer1.0", "layer2.1", loss) for loss in losses),
        *(("layer2.0", "layer1.1", loss) for loss in losses),
    ]


def signed(content: dict[str, Any], path: Path) -> Path:
    """A hint file of any content, whose checksum is right."""
    path.write_text(yaml.safe_dump({**content, "checksum": checksum(content)}))
    return path


def test_file_of_before_these_keys_is_read(exported: Exported, tmp_path: Path) -> None:
    content = exported.hints.model_dump(mode="json")
    for key in ("embedding_weight", "embedding_loss", "normalise", "warmup", "dynamic_weights", "loss_code_sha256"):
        del content["hints"][key]
    del content["data"]["meta_images"]
    del content["training"]["recipe"]["optimizer"]
    older = load_hints(signed(content, tmp_path / "older.yaml"))
    configuration = older.hints.configuration()
    assert configuration.normalise
    assert (configuration.embedding_weight, configuration.warmup, configuration.dynamic_weights) == (0, None, None)
    assert configuration.pairs == exported.hints.hints.configuration().pairs


def test_file_of_before_these_keys_is_retrained(exported: Exported, tmp_path: Path) -> None:
    content = exported.hints.model_dump(mode="json")
    pairs = [pair for pair in content["hints"]["pairs"] if pair["loss"] == "at"]
    kept = ("classification_weight", "logit_weight", "logit_loss", "temperature")
    content["hints"] = {"pairs": pairs, **{key: content["hints"][key] for key in kept}}
    del content["data"]["meta_images"]
    del content["training"]["recipe"]["optimizer"]
    content["training"]["rungs"] = [1]
    older = load_hints(signed(content, tmp_path / "older.yaml"))
    (student,) = distill_student(older, output=tmp_path / "student.safetensors")
    assert 0 <= student.test_accuracy <= 1


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("warmup", {"order": "up"}, "hints: warmup.order is 'up'; "),
        ("warmup", {"epochs": [0]}, "hints: warmup.epochs has 0, but each must be at least 1; choose 3"),
        ("warmup", {"pace": 1}, "hints: warmup or dynamic_weights has what this hintsearch does not know ("),
        ("dynamic_weights", {"momentum": 1}, "hints: dynamic_weights.momentum is 1, but must be at least 0 and below"),
        ("dynamic_weights", {"pace": 1}, "hints: warmup or dynamic_weights has what this hintsearch does not know ("),
    ],
)
def test_file_with_a_method_that_is_none_is_refused_in_one_line(
    exported: Exported, tmp_path: Path, section: str, change: dict[str, Any], said: str
) -> None:
    content = exported.hints.model_dump(mode="json")
    content["hints"][section] |= change
    path = signed(content, tmp_path / "hints.yaml")
    with pytest.raises(InputError) as caught:
        load_hints(path)
    assert str(caught.value).startswith(f"{path} is damaged: {said}")
    assert "\n" not in str(caught.value)


def refusal(hints: HintFile, output: Path, trust_code: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        distill_student(hints, output=output / "student.safetensors", trust_code=trust_code)
    assert list(output.glob("student*")) == []
    return str(caught.value)


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """Own code that must not run."""
    (tmp_path / "bomb.py").write_text("raise SystemExit('it ran')")
    return tmp_path / "bomb.py"


def test_own_loss_of_a_file_does_not_run_unasked(exported: Exported, tmp_path: Path) -> None:
    sha256 = own_code_sha256(exported.own)
    assert sha256 is not None
    assert refusal(exported.hints, tmp_path) == (
        f"the hint file names the code {exported.own} (loss; {exported.own_code}, sha256 {sha256[:12]} at the export); "
        "look at it, then add --trust-code to run it"
    )


Change = Callable[[dict[str, Any], str], None]
PLACES: dict[str, Change] = {
    "pair": lambda hints, name: hints["pairs"][0].update(loss=name),
    "pair of weight 0": lambda hints, name: hints["pairs"][0].update(loss=name, weight=0),
    "logit loss": lambda hints, name: hints.update(logit_loss=name),
    # Named, and so loaded, whatever its weight.
    "logit loss of weight 0": lambda hints, name: hints.update(logit_loss=name, logit_weight=0),
    "penultimate features": lambda hints, name: hints.update(embedding_loss=name),
    "warm-up": lambda hints, name: hints["warmup"].update(loss=name),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_place_for_a_loss_runs_code_unasked(exported: Exported, bomb: Path, tmp_path: Path, place: str) -> None:
    content = exported.hints.model_dump(mode="json")
    for pair in content["hints"]["pairs"]:
        pair["loss"] = "at"
    PLACES[place](content["hints"], f"{bomb}:own")
    hints = load_hints(signed(content, tmp_path / "hints.yaml"))
    assert f"{bomb}:own (loss; {bomb}, sha256 unknown at the export)" in refusal(hints, tmp_path)
    # Trusted, it is still not what was exported.
    assert refusal(hints, tmp_path, trust_code=True).startswith(f"{bomb}:own has changed since the export; ")


def test_own_loss_that_changed_since_the_export_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints = exported.hints
    before = exported.own_code.read_text()
    exported.own_code.write_text(before + "\n# changed\n")
    try:
        assert refusal(hints, tmp_path, trust_code=True) == (
            f"{exported.own} has changed since the export; bring the file back, or search again"
        )
    finally:
        exported.own_code.write_text(before)


def test_own_loss_that_is_gone_is_refused(exported: Exported, tmp_path: Path) -> None:
    content = json.loads(exported.hints.model_dump_json().replace("mine.py", "gone.py"))
    hints = load_hints(signed(content, tmp_path / "hints.yaml"))
    assert refusal(hints, tmp_path, trust_code=True).startswith(
        f"loss '{exported.own_code.with_name('gone.py')}:own': there is no file "
    )
