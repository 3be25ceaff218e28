"""Channel counts of a network that is made wider or narrower."""


def scaled(count: int, width: float, multiple: int = 1) -> int:
    """`count` × `width`, rounded to a multiple of `multiple`, and at least that."""
    return max(1, round(count * width / multiple)) * multiple
