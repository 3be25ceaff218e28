"""A real PostgreSQL server of a test's own, as Debian's package has it."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from processes import Family, wait_for

# PostgreSQL refuses root.
OWNER = "postgres"


@contextmanager
def postgres_database() -> Iterator[str]:
    """An empty database for a while; gives its address for SQLAlchemy, on 127.0.0.1."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    family = Family()
    try:
        if os.getuid() == 0:
            shutil.chown(folder, OWNER, OWNER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = ["-h", "127.0.0.1", "-p", port, "-U", OWNER]
        run = [*_as_owner(), str(_programs() / "initdb"), "-D", str(folder / "data"), "-U", OWNER, "-A", "trust"]
        subprocess.run(run, check=True, capture_output=True, cwd=folder)
        family.serve(
            [
                *_as_owner(),
                str(_programs() / "postgres"),
                *("-D", str(folder / "data"), "-p", port, "-k", str(folder)),
                *("-c", "listen_addresses=127.0.0.1"),
            ],
            folder,
        )
        assert wait_for(lambda: subprocess.run([_programs() / "pg_isready", *place]).returncode == 0, 60)
        subprocess.run([_programs() / "createdb", *place, "mlflow"], check=True)
        yield f"postgresql+psycopg2://{OWNER}@127.0.0.1:{port}/mlflow"
    finally:
        family.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """Where the newest version's programs are; the package's wrappers on the path lack some."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not versions:
        raise FileNotFoundError("no PostgreSQL in /usr/lib/postgresql: install Debian's package postgresql")
    return versions[-1]


def _as_owner() -> Sequence[str]:
    """Words that let the ones behind them run as another user than root."""
    return ["setpriv", f"--reuid={OWNER}", f"--regid={OWNER}", "--init-groups"] if os.getuid() == 0 else []
