"""A search whose disk fills up, and that goes on when there is space again; writes what happened as JSON.

A process of its own, in a mount namespace of its own (`unshare --map-root-user --mount`): the disk is a small tmpfs on
the folder of results that nobody else sees, and that is gone with the process.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from disturbances import DisturbedSearch, reported

SIZE = 24 << 20
# More than a line of the journal, less than a checkpoint.
ROOM_FOR_THE_JOURNAL = 48 << 10


def main(folder: Path, cache: Path, answer: Path) -> None:
    search = DisturbedSearch(folder, cache, "full")
    disk = search.results.parent
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(disk)], check=True)
    ballast = disk / "ballast"
    legs = {}
    for name, moment, room in (
        ("nothing fits", reported(3, 2), 0),
        ("lines fit", reported(4, 4), ROOM_FOR_THE_JOURNAL),
    ):
        legs[name] = asdict(search.disturb(moment, _filling(ballast, room), *(["--resume"] if legs else [])))
        # Not journal_events: a damaged line is what is looked for.
        legs[name]["journal"] = (search.results / "journal.jsonl").read_text()
        ballast.unlink()
    last = search.finish("--resume")
    answer.write_text(json.dumps({"legs": legs, "last": asdict(last), "events": search.events()}))


def _filling(ballast: Path, room: int) -> Callable[[Any], None]:
    """What fills the disk but for so many bytes; a smaller file is written anew, for it may have freed pages."""

    def fill(_process: Any) -> None:
        block = b"0" * 4096
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(block)
            except OSError:
                pass
            file.truncate(max(0, file.tell() - room))

    return fill


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
