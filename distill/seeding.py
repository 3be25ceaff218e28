"""Seeds derived from seeds, so that what is unrelated is independent and any part can be made again alone."""

import hashlib


def derived_seed(purpose: str, *numbers: int) -> int:
    """A seed for one purpose, 0 .. 2⁶³−1; a hash, so that neighbouring numbers give unrelated seeds."""
    text = "|".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
