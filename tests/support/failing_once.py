"""A fault that comes once."""

from typing import Any

import torch


class FailsOnce:
    """Really asks for more memory than there is, at one of its calls; fits wherever torch or a test calls something.

    Attributes:
        calls: so far.

    Args:
        at: the number of that call, from 0.
    """

    def __init__(self, at: int) -> None:
        self.calls, self._at = 0, at

    def __call__(self, *_call: Any) -> None:
        self.calls += 1
        if self.calls == self._at + 1:
            torch.empty(2**60, dtype=torch.uint8)
