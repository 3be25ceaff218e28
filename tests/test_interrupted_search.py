"""What an interrupt before a search leaves; tests/system interrupts searches."""

import os
import signal
from pathlib import Path

from processes import CommandLine, users_project, wait_for

# 127.0.0.1, the same in IPv6, and ::1, as /proc/net has them.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


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
    """And meanwhile no other machine can reach what was started."""
    folder = users_project(tmp_path, tiny_study_text)
    command_line = CommandLine(tmp_path / "cache")
    arguments = ["layers", "tiny.yaml", "--set", "teacher.recipe.epochs=1000"]
    process = command_line.start(arguments, folder)
    assert wait_for(lambda: "ray::_train" in command_line.names(), 60), process.communicate()
    listening = command_line.listens_on()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "Interrupted; what was finished is cached. Go on with:" in err
    assert f"hintsearch {' '.join(arguments)}" in err
    assert not (folder / "figures").exists()
    assert listening
    assert listening <= LOOPBACK
