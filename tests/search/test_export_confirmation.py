"""What an exported file says of the repeats with fresh seeds, and of a searched student's width."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hintsearch.analysis.trials import SearchRecord
from hintsearch.analysis.verdict import describe
from hintsearch.search.events import Event, Finished, Reported, Suggested
from hintsearch.search.export import EvidencePart, checksum, export_hints, load_hints
from hintsearch.search.preparation import Preparation
from hintsearch.search.study import Study
from mlflow.tracking import MlflowClient
from recorded_search import recorded_search

NAME = "confirmed-20260101-120000"
# Of the search phase: control arm, accuracy.
TRIALS = {1: ("kd_only", 0.7), 2: ("", 0.9)}
# Of each repeat: what it confirms, seed, accuracy; the last one failed.
REPEATS = {3: (2, 11, 0.80), 4: (1, 11, 0.75), 5: (2, 12, 0.81), 6: (1, 12, 0.77), 7: (2, 13, 0.85), 8: (1, 13, None)}


@pytest.fixture(scope="module")
def confirmed(
    client: MlflowClient,
    digits: Study,
    preparation: Preparation,
    suggested: Callable[..., Suggested],
    tmp_path_factory: pytest.TempPathFactory,
) -> SearchRecord:
    """A finished search with repeats."""
    events: list[Event] = []
    for number, (control, accuracy) in TRIALS.items():
        events += [suggested(number, control), *ended(number, accuracy)]
    for number, (confirms, seed, value) in REPEATS.items():
        first = suggested(confirms, TRIALS[confirms][0])
        repeat = replace(first, number=number, arm="confirm", data_seed=seed, init_seed=seed + 100, confirms=confirms)
        events += [repeat, *ended(number, value)]
    return recorded_search(client, NAME, digits, preparation, tmp_path_factory.mktemp("confirmed"), events)


def ended(number: int, accuracy: float | None) -> list[Event]:
    if accuracy is None:
        return [Finished(number, "failed", "it broke")]
    return [Reported(number, 24, {"val_accuracy": accuracy}, None), Finished(number, "completed", "")]


@pytest.fixture(scope="module")
def evidence(client: MlflowClient, confirmed: SearchRecord, tmp_path_factory: pytest.TempPathFactory) -> EvidencePart:
    """Of the exported winner, as read back from its file."""
    path = tmp_path_factory.mktemp("export") / "hints.yaml"
    export_hints(client, confirmed, path)
    return load_hints(path).evidence


def test_evidence_has_mean_spread_and_seeds_of_all_that_was_confirmed(evidence: EvidencePart) -> None:
    assert evidence.confirm is not None
    found = {c.trial: c for c in evidence.confirm.configurations}
    assert {number: (c.control, c.seeds) for number, c in found.items()} == {1: ("kd_only", 2), 2: ("", 3)}
    assert (found[1].mean, found[1].sd) == pytest.approx((0.76, 0.02 / 2**0.5))
    assert (found[2].mean, found[2].sd) == pytest.approx((0.82, 0.0007**0.5))


def test_evidence_names_the_runs_of_the_repeats(
    client: MlflowClient, confirmed: SearchRecord, evidence: EvidencePart
) -> None:
    assert evidence.confirm is not None
    for configuration in evidence.confirm.configurations:
        tags = [client.get_run(run_id).data.tags for run_id in configuration.run_ids]
        assert {tag["confirms"] for tag in tags} == {str(configuration.trial)}
        assert sorted(int(tag["trial"]) for tag in tags) == [
            number for number, (confirms, *_) in REPEATS.items() if confirms == configuration.trial
        ]


def test_evidence_has_the_one_test_with_its_words(confirmed: SearchRecord, evidence: EvidencePart) -> None:
    assert evidence.confirm is not None
    test = evidence.confirm.test
    assert test is not None
    assert (test.winner, test.control, test.control_name, test.seeds) == (2, 1, "kd_only", 2)
    # Of the seeds that both have: 0.80 - 0.75 and 0.81 - 0.77.
    assert test.mean == pytest.approx(0.045)
    found = confirmed.confirmation()
    assert found is not None
    assert found.comparison is not None
    assert test.said == describe(found.comparison, "val_accuracy")
    assert "kd_only" in test.said


def test_evidence_counts_the_seeds_of_the_exported_configuration(evidence: EvidencePart) -> None:
    assert evidence.seeds == 3


def test_evidence_of_a_search_that_confirmed_nothing_is_of_one_seed(
    client: MlflowClient, confirmed: SearchRecord, tmp_path: Path
) -> None:
    unconfirmed = replace(confirmed, trials=tuple(t for t in confirmed.trials if not t.confirms))
    found = export_hints(client, unconfirmed, tmp_path / "hints.yaml").evidence
    assert (found.confirm, found.seeds) == (None, 1)


def test_file_of_before_there_were_repeats_is_still_read(
    client: MlflowClient, confirmed: SearchRecord, tmp_path: Path
) -> None:
    content = export_hints(client, confirmed, tmp_path / "hints.yaml").model_dump(mode="json")
    del content["evidence"]["confirm"]
    (tmp_path / "older.yaml").write_text(yaml.safe_dump({**content, "checksum": checksum(content)}))
    assert load_hints(tmp_path / "older.yaml").evidence.confirm is None


@pytest.mark.parametrize("width", [0.5, None])
def test_student_has_the_width_of_its_trial(
    client: MlflowClient,
    studied: Callable[..., Study],
    preparation: Preparation,
    suggested: Callable[..., Suggested],
    tmp_path: Path,
    width: float | None,
) -> None:
    study = studied("space.student_width=[0.25, 0.5]") if width else studied()
    trial = suggested(1)
    searched = {"student.width": width} if width else {}
    trial = replace(trial, parameters={**trial.parameters, **searched})
    name = f"width-{width}"
    record = recorded_search(client, name, study, preparation, tmp_path, [trial, *ended(1, 0.9)])
    student = export_hints(client, record, tmp_path / "hints.yaml").student
    assert student.spec().width == (width or study.student.width)
