"""What the command line answers, and what it keeps from calling out."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hintsearch.search.command_line import main


def _answer(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    monkeypatch.setattr(sys, "argv", ["hintsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("models", {"resnet8", "resnet20", "resnet110", "resnet32x4"}),
        ("losses", {"kd", "fitnet", "at", "sp"}),
        ("metrics", {"r2_cca", "cka_linear", "effective_rank", "class_separation"}),
        ("selectors", {"paper_kmeans", "kmedoids", "stage_ends", "evenly_spaced", "random", "reversed", "last"}),
        ("pairings", {"by_depth", "by_size", "by_similarity"}),
        ("datasets", {"digits", "fashion_mnist", "cifar10", "cifar100"}),
    ],
)
def test_a_list_names_each_entry_with_its_source(
    command: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _answer([command, "--json"], monkeypatch, capsys)
    assert isinstance(rows, list)
    assert expected <= {row["name"] for row in rows}
    assert all(row["source"] for row in rows)


def test_table_of_metrics_shows_all_that_they_declare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _answer(["metrics", "--json"], monkeypatch, capsys)
    assert isinstance(rows, list)
    monkeypatch.setattr(sys, "argv", ["hintsearch", "metrics"])
    with pytest.raises(SystemExit):
        main()
    cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    columns = ["".join(cell.strip().replace(" ", "") for cell in column) for column in zip(*cells, strict=True)]
    for row in rows:
        assert {"kind", "range", "direction", "invariances", "source"} <= set(row)
        for value in row.values():
            assert any(value.replace(" ", "") in column for column in columns), value


def test_a_dry_run_needs_no_data_and_shows_the_candidates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HINTSEARCH_CACHE", str(tmp_path / "cache"))
    changes = ["--set", "data.name=cifar100", "--set", "teacher.model=resnet56"]
    checked = _answer(["check", "digits", "--dry-run", *changes, "--json"], monkeypatch, capsys)
    assert isinstance(checked, dict)
    assert len(checked["candidates"]) == 27
    assert checked["candidates"][-1]["path"] == "layer3.8"
    assert list(tmp_path.iterdir()) == []


def test_trap_29_nobody_is_called_unless_the_user_wants_it() -> None:
    program = (
        "import os, hintsearch.search.command_line;"
        "print(os.environ['RAY_USAGE_STATS_ENABLED'], os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    )
    names = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    plain = {key: value for key, value in os.environ.items() if key not in names}
    wanted = {**plain, "RAY_USAGE_STATS_ENABLED": "1", "MLFLOW_DISABLE_TELEMETRY": "false"}
    said = [
        subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
        for env in (plain, wanted)
    ]
    assert [line.split() for line in said] == [["0", "true"], ["1", "false"]]


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@host:5000",
        "https://secret@host:5000",
        "postgresql://me:secret@host/db",
        "postgresql://me@host/db?sslmode=require&password=secret",
    ],
)
def test_trap_9_a_password_in_the_stores_address_is_refused_and_not_repeated(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hintsearch", "compare", "digits", "--tracking", uri])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "holds a password" in said.err
    assert "secret" not in said.err + said.out


# Ray makes a folder there as soon as it starts, and leaves it.
CHECKED = """
import os, sys
import ray
from hintsearch.search.command_line import app

if sys.argv[1] == "ray":
    ray.init("local", num_cpus=1, include_dashboard=False)
else:
    app(sys.argv[1:], standalone_mode=False)
print(os.listdir(os.environ["RAY_TMPDIR"]))
"""


@pytest.mark.parametrize(("arguments", "made"), [(["check", "digits", "--json"], "[]"), (["ray"], "['ray']")])
def test_a_local_check_starts_no_ray(arguments: list[str], made: str) -> None:
    # Short, for Ray keeps its sockets there.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        env |= {"RAY_TMPDIR": folder, "HINTSEARCH_CACHE": folder + "-cache"}
        checked = subprocess.run(
            [sys.executable, "-c", CHECKED, *arguments], cwd=folder, env=env, capture_output=True, text=True
        )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines()[-1] == made
