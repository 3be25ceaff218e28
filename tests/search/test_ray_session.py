"""What is said of a cluster that cannot be joined."""

import socket
import subprocess
import sys

JOINS = """
import sys
from hintsearch.models.errors import InputError
from hintsearch.search.ray_session import ray_session

try:
    with ray_session(sys.argv[1]):
        print("it was joined")
except InputError as error:
    print(error)
"""


def test_address_where_nothing_answers_is_one_line_at_once() -> None:
    with socket.socket() as free:
        # Bound, but not listening: nobody else takes the port meanwhile.
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        # Ray itself would try for minutes.
        ended = subprocess.run([sys.executable, "-c", JOINS, address], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == [
        f"there is no Ray cluster at {address}: nothing answers; leave --address out to start one"
    ]
