"""What an interrupt leaves: processes, real Ray, Tune and MLflow."""

import os
import signal
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from processes import CommandLine, experiment_id, journal_events, users_project, wait_for


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trap_4_a_signal_saves_everything_and_exits_3_with_the_resume_command(
    number: signal.Signals, shared_cache: Path, tiny_study_text: str, tmp_path: Path
) -> None:
    folder = users_project(tmp_path, tiny_study_text)
    command_line = CommandLine(shared_cache, console_script=True)
    process = command_line.start(["search", "tiny.yaml", "--name", "stopped"], folder)
    results = folder / "results" / "stopped"
    assert wait_for(lambda: len(journal_events(results, "report")) > 1, 90), process.communicate()
    # A terminal's Ctrl-C goes to the whole group, a job manager's SIGTERM to the driver alone.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "hintsearch search tiny.yaml --name stopped --resume" in out
    assert command_line.wait_until_gone(10) == []
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert {run.info.status for run in client.search_runs([experiment_id(client)])} <= {"FINISHED", "KILLED"}


def test_trap_36_sigterm_ends_what_a_script_has_put_into_the_background(tiny_study_text: str, tmp_path: Path) -> None:
    """A shell without job control makes such a process ignore Ctrl-C; what asks it to end is not Ctrl-C."""
    folder = users_project(tmp_path, tiny_study_text)
    command_line = CommandLine(tmp_path / "cache")
    words = [*command_line.command, "layers", "tiny.yaml", "--set", "teacher.recipe.epochs=1000"]
    process = command_line.spawn(["sh", "-c", '"$@" & echo $!; wait $!', "sh", *words], folder)
    assert process.stdout is not None
    background = int(process.stdout.readline())
    assert wait_for(lambda: "ray::_train" in command_line.names(), 60), process.communicate()
    os.kill(background, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "Interrupted; what was finished is cached. Go on with:" in err


def test_an_interrupt_before_a_search_says_how_to_go_on(tiny_study_text: str, tmp_path: Path) -> None:
    folder = users_project(tmp_path, tiny_study_text)
    command_line = CommandLine(tmp_path / "cache")
    arguments = ["layers", "tiny.yaml", "--set", "teacher.recipe.epochs=1000"]
    process = command_line.start(arguments, folder)
    assert wait_for(lambda: "ray::_train" in command_line.names(), 60), process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "Interrupted; what was finished is cached. Go on with:" in err
    assert f"hintsearch {' '.join(arguments)}" in err
    assert not (folder / "figures").exists()
