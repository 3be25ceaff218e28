"""Memory and processor time of a running process and of those below it, by /proc (Linux)."""

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Field 14 of /proc/PID/stat and the one after it, counted from what follows the name in brackets.
USER_TIME, SYSTEM_TIME, PARENT = 11, 12, 1
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a process holds and has used.

    Attributes:
        megabytes: resident and not shared: pages of Ray's object store belong to all.
        cpu_seconds: user and system.
    """

    megabytes: float
    cpu_seconds: float


def usage(process: int) -> Usage:
    """Of one process.

    Raises:
        OSError: it has ended.
    """
    status = dict(line.split(":", 1) for line in (PROC / str(process) / "status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssShmem")}
    times = _stat(process)
    used = (int(times[USER_TIME]) + int(times[SYSTEM_TIME])) / TICKS
    return Usage((kilobytes["VmRSS"] - kilobytes["RssShmem"]) / 1e3, used)


def below(process: int, named: str = "") -> list[int]:
    """The processes below one, those whose command line holds a text, in the order of their numbers."""
    parents: dict[int, int] = {}
    for place in PROC.iterdir():
        if place.name.isdigit():
            try:
                parents[int(place.name)] = int(_stat(int(place.name))[PARENT])
            except OSError:
                continue
    return sorted(child for child in parents if _is_below(child, process, parents) and named in _command(child))


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; a name may hold brackets and blanks."""
    return (PROC / str(process) / "stat").read_text().rpartition(")")[2].split()


def _is_below(child: int, process: int, parents: dict[int, int]) -> bool:
    while child in parents:
        child = parents[child]
        if child == process:
            return True
    return False


def _command(process: int) -> str:
    try:
        return (PROC / str(process) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
