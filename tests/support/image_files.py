"""Small image files for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    """Writes a smooth random picture of (height, width) pixels; the format follows the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC).convert(mode).save(path)


def write_class_folders(folder: Path, classes: str = "abc", count: int = 10, suffix: str = ".png") -> None:
    """Writes `count` pictures of several sizes into a folder for each class, all of them different."""
    for label, name in enumerate(classes):
        for number in range(count):
            seed = 1000 * label + number
            write_image(folder / name / f"{number:03}{suffix}", seed, size=(12 + seed % 5, 10 + seed % 7))


def truncate(path: Path, share: float = 0.5) -> None:
    """Cuts a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
