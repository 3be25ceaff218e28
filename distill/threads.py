"""Torch's CPU threads for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's intra-op threads and gives the former number back.

    Two threads on a machine that is busy otherwise were measured twenty times slower than one on networks as small as
    those of the digits study: the threads wait for each other at every layer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
