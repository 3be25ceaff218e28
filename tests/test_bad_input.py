"""Bad input is one line with value, rule and mend, exit code 2, and nothing created."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hintsearch.search.command_line import main
from processes import CommandLine

Listing = Callable[[Path], dict[str, bytes]]

CASES = {
    "a name that is no folder name": (["search", "digits", "--name", "../it's"], "choose another --name"),
    "unknown study": (["search", "digit"], "did you mean 'digits'?"),
    "missing study file": (["search", "no/such.yaml"], "there is no study file no/such.yaml"),
    "binary rubbish as a study": (["search", "rubbish.yaml"], "is not a text file"),
    "no mapping": (["search", "list.yaml"], "a study is a mapping of keys"),
    "unknown key": (["search", "digits", "--set", "budgt.trials=3"], "unknown key 'budgt'; did you mean 'budget'?"),
    "unknown nested key": (["check", "digits", "--set", "budget.trails=3"], "did you mean 'trials'?"),
    "unknown model": (["search", "digits", "--set", "student.model=resnet9"], "did you mean 'resnet8'?"),
    "unknown loss": (["search", "digits", "--set", "space.loss.hint=[fitnt]"], "did you mean 'fitnet'?"),
    "unknown metric": (["search", "digits", "--set", "space.hints.metrics=[r2_ca]"], "did you mean 'r2_cca'?"),
    "unknown selector": (["search", "digits", "--set", "space.hints.selectors=[kmedoid]"], "did you mean 'kmedoids'?"),
    "unknown data set": (["search", "digits", "--set", "data.name=digts"], "did you mean 'digits'?"),
    "too many clusters": (
        ["search", "digits", "--set", "space.hints.clusters.high=40"],
        "space.hints.clusters.high is 40, but the teacher resnet20 has 9 candidates; choose 1..9",
    ),
    "too many clusters, dry run": (
        ["check", "digits", "--dry-run", "--set", "space.hints.clusters=40"],
        "is 40, but the teacher resnet20 has 9 candidates; choose 1..9",
    ),
    "too many hint points": (
        ["hints", "digits", "--clusters", "10"],
        "--clusters is 10, but the teacher resnet20 has 9 candidates; choose 1..9",
    ),
    "hints with an unknown metric": (
        ["hints", "digits", "--clusters", "2", "--metrics", "r2_cca,cka"],
        "unknown layer metric 'cka'",
    ),
    "hints with an unknown selector": (
        ["hints", "digits", "--clusters", "2", "--selector", "kmeans"],
        "did you mean 'paper_kmeans'?",
    ),
    "too few images for r2_cca": (
        ["search", "digits", "--set", "layers.images=100"],
        "r2_cca needs at least 128 images for layers of 64 channels, but there are 100",
    ),
    "hints with clusters that are no number": (
        ["hints", "digits", "--clusters", "many"],
        "--clusters is 'many', but must be a number or auto",
    ),
    "hints with a weight that is no number": (
        ["hints", "digits", "--clusters", "2", "--metrics", "r2_cca=x"],
        "--metrics has 'r2_cca=x', but a weight must be a number; write r2_cca=2",
    ),
    "hints with a weight of 0": (
        ["hints", "digits", "--clusters", "2", "--metrics", "r2_cca=0,cka_linear"],
        "the weight of the layer metric 'r2_cca' is 0, but must be above 0; leave it out",
    ),
    "hints with an unknown pairing": (
        ["hints", "digits", "--clusters", "2", "--pairing", "by_dept"],
        "unknown pairing 'by_dept'; did you mean 'by_depth'?",
    ),
    "hints with an empty name of a metric": (
        ["hints", "digits", "--clusters", "2", "--metrics", "r2_cca,"],
        "--metrics has an empty name between its commas; write a,b or a,b=2",
    ),
    "layers whose sums do not fit": (
        ["layers", "digits", "--set", "layers.memory_gb=1e-6"],
        "layers.memory_gb is 1e-06, but the sums of 9 candidates",
    ),
    "layers of which one is not there": (
        ["layers", "digits", "--set", "layers.candidates=['layer1.?', layer4.0]"],
        "'layer4.0'",
    ),
    "pictures in a file": (["layers", "digits", "--output", "study.yaml"], "is a file; name a folder"),
    "an unknown pairing": (["search", "digits", "--set", "space.hints.pairings=[depth]"], "unknown pairing 'depth'"),
    "a weight of a metric that is not combined": (
        ["check", "digits", "--set", "space.hints.metric_weights={rsa: 2}"],
        "space.hints.metric_weights has 'rsa', which is not in space.hints.metrics",
    ),
    "candidates that no pattern matches": (
        ["check", "digits", "--dry-run", "--set", "layers.candidates=['layr*.?']"],
        "layr*.?",
    ),
    "sums that do not fit": (
        ["check", "digits", "--set", "layers.memory_gb=1e-6"],
        "layers.memory_gb is 1e-06, but the sums of 9 candidates and 10 classes take at least",
    ),
    "too many CPUs": (["search", "digits", "--set", "resources.cpus_per_trial=4096"], "but this machine has"),
    "a checkpoint that is not there": (
        ["search", "digits", "--set", "teacher.checkpoint=gone.pt"],
        "there is no weights file",
    ),
    "a checkpoint that is rubbish": (
        ["search", "digits", "--set", "teacher.checkpoint=rubbish.pt"],
        "cannot be read as weights",
    ),
    "a data folder that lacks a split": (["check", "digits", "--set", "data.name=half"], "has no test.npz"),
    "a data folder that is damaged": (["check", "digits", "--set", "data.name=damaged"], "cannot be read"),
    "a tracking store that is no address": (["search", "digits", "--tracking", "here"], "is no address"),
    "a tracking store that does not answer": (
        ["search", "digits", "--tracking", "http://127.0.0.1:9"],
        "the tracking store http://127.0.0.1:9 does not answer",
    ),
    "a tracking store of an unknown kind": (
        ["search", "digits", "--tracking", "foo://here"],
        "the tracking store foo://here is of no kind that MLflow knows; name a server as http://HOST:PORT",
    ),
    "resume of nothing": (["search", "digits", "--resume"], "there is no search 'digits'"),
    "resume of a damaged journal": (["search", "--resume", "--name", "broken"], "is damaged in line 1"),
    "hints that name a metric twice": (
        ["hints", "digits", "--clusters", "2", "--metrics", "r2_cca, r2_cca"],
        "names 'r2_cca' twice",
    ),
    "check of a store that does not answer": (
        ["check", "digits", "--tracking", "http://127.0.0.1:9"],
        "the tracking store http://127.0.0.1:9 does not answer",
    ),
    "missing hint file": (["distill", "gone.yaml"], "there is no hint file gone.yaml"),
    "binary rubbish as a hint file": (["distill", "rubbish.yaml"], "is no hint file"),
    "a study as a hint file": (["distill", "study.yaml"], "it has no version"),
    "a hint file of another version": (["distill", "future.yaml"], "has version 99"),
    "a damaged hint file": (["distill", "damaged.yaml"], "is damaged: the key 'search' is missing"),
    "compare without a store": (["compare", "digits"], "there is no tracking store"),
    "export without a store": (["export", "digits", "-o", "h.yaml"], "there is no tracking store"),
    "ui without a store": (["ui"], "there is no tracking store"),
    "storage that is a file": (["search", "digits", "--set", "storage.path=study.yaml"], "is no folder"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with wrong files of every kind in it."""
    place = tmp_path / "here"
    place.mkdir()
    rubbish = bytes(range(128, 256)) * 4
    for name in ("rubbish.yaml", "rubbish.pt"):
        (place / name).write_bytes(rubbish)
    (place / "list.yaml").write_text("- 1\n- 2\n")
    (place / "study.yaml").write_text("name: x\n")
    (place / "future.yaml").write_text("version: 99\n")
    (place / "damaged.yaml").write_text("version: 1\n")
    for name in ("half", "damaged"):
        (place / name).mkdir()
        np.savez(place / name / "train.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    (place / "damaged" / "test.npz").write_bytes(rubbish)
    (place / "results" / "broken").mkdir(parents=True)
    (place / "results" / "broken" / "journal.jsonl").write_text('{"event": "bega\n')
    monkeypatch.chdir(place)
    monkeypatch.setenv("HINTSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    return place


@pytest.mark.parametrize(("arguments", "said"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_one_line_and_creates_nothing(
    arguments: list[str],
    said: str,
    folder: Path,
    listing: Listing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = listing(folder.parent)
    monkeypatch.setattr(sys, "argv", ["hintsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("error: ")
    assert said in error
    assert listing(folder.parent) == before


def test_a_wrong_flag_exits_2_and_names_it(folder: Path, listing: Listing) -> None:
    before = listing(folder.parent)
    ended = CommandLine(folder.parent / "cache").run(["search", "--trails", "3"], folder)
    assert ended.code == 2
    assert "No such option: --trails" in ended.err
    assert listing(folder.parent) == before


def test_a_wrong_study_as_a_process_exits_2_with_one_line(folder: Path, listing: Listing) -> None:
    before = listing(folder.parent)
    ended = CommandLine(folder.parent / "cache").run(["search", "digits", "--set", "seed=x"], folder)
    assert ended.code == 2
    assert ended.err == (
        'error: digits: seed is "x", but input should be a valid integer, unable to parse string as an integer; '
        "change seed\n"
    )
    assert ended.out == ""
    assert listing(folder.parent) == before
