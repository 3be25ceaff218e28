"""How many copies of the data a node holds, however many trials run on it.

N = 1, 2, 4 Ray actors on one node each open the same splits, CIFAR-100 in shape and size, out of the object store and
read an epoch of batches. Compares, for each N:

- shared: `DeviceImages` on the arrays as Ray gives them, as a trial does it.
- copied: the same on a copy of the arrays that each actor makes, to show that the figures would tell.

An actor's private memory (USS) is what it alone holds, by /proc/self/smaps_rollup; its growth counts from when it has
read an epoch of a few images. Copies on the node are the object store's pages (once, if all actors map the same file)
and the actors' private growth, over the size of the data.
"""

import argparse
import ctypes
import json
import os
import statistics
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
from hintsearch.distill.batches import Augmentation, DeviceImages
from hintsearch.distill.data import DataSplits, ImageSet
from rich.console import Console
from rich.table import Table

ACTORS = (1, 2, 4)
CLASSES = 100
BATCH = 128
FEW = 2_000
LIMIT = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    splits = DataSplits(made(rng, 40_000), made(rng, 10_000), None, CLASSES, (0.5,) * 3, (0.25,) * 3)
    parts = (splits.train, splits.validation)
    size = sum(part.read(np.arange(len(part))).nbytes + part.labels.nbytes for part in parts)
    # Without an address Ray would join a cluster that somebody else has on this machine.
    ray.init("local", num_cpus=max(ACTORS), include_dashboard=False, log_to_driver=False)
    few = DataSplits(made(rng, FEW), made(rng, FEW), None, CLASSES, splits.mean, splits.sd)
    stored = ray.put(few), ray.put(splits)
    ways = {
        f"{way}_{count}": measured(stored, count, way == "copied") for way in ("shared", "copied") for count in ACTORS
    }
    ray.shutdown()
    figures = {
        **{f"copies_per_node_at_{count}": copies(ways[f"shared_{count}"], size) for count in ACTORS},
        **{f"copies_per_node_if_copied_at_{count}": copies(ways[f"copied_{count}"], size) for count in ACTORS},
        "data_megabytes": size / 1e6,
        "ways": ways,
        "machine": f"{os.cpu_count()} cores, {machine()}, Python {python_version()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def made(rng: np.random.Generator, count: int) -> ImageSet:
    """Random images of CIFAR-100's shape."""
    return ImageSet(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, CLASSES, count))


@ray.remote(num_cpus=1)
class Reader:
    """A process that reads an epoch, as a trial does."""

    def read(self, stored: list[Any], copied: bool) -> int:
        """Takes splits out of the object store, reads an epoch and all validation images; returns how many."""
        torch.set_num_threads(1)
        splits = ray.get(stored[0])
        self._kept = []
        for part in (splits.train, splits.validation):
            data = ImageSet(part.images.copy(), part.labels.copy()) if copied else part
            self._kept.append(DeviceImages(data, splits.preprocessing, torch.device("cpu")))
        train, validation = self._kept
        images = sum(len(batch.labels) for batch in train.epoch(1, BATCH, 0, Augmentation()))
        return images + sum(len(batch.labels) for batch in validation.in_order(BATCH))

    def memory(self) -> dict[str, int]:
        """Bytes: private, proportional, and of the object store's file that are mapped; and that file's number."""
        # What is free already is given back, so that only what lives is counted.
        ctypes.CDLL(None).malloc_trim(0)
        rollup = fields(Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        plasma, inode = 0, 0
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                inside = "plasma" in line
                inode = int(words[4]) if inside else inode
            elif inside and words[0] == "Rss:":
                plasma += int(words[1]) * 1024
        return {
            "private": rollup["Private_Clean"] + rollup["Private_Dirty"],
            "proportional": rollup["Pss"],
            "store": plasma,
            "store_file": inode,
        }


def fields(lines: list[str]) -> dict[str, int]:
    """Of lines like `Pss: 12 kB`, in bytes."""
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in (line.split() for line in lines)}


def measured(stored: tuple[Any, Any], count: int, copied: bool) -> dict[str, Any]:
    """So many actors that read the same splits at the same time, all of them alive when they are measured."""
    readers: list[Any] = [Reader.remote() for _ in range(count)]
    few, everything = stored
    # So that what is loaded and allocated for any reading is there.
    ray.get([reader.read.remote([few], copied) for reader in readers])
    before = ray.get([reader.memory.remote() for reader in readers])
    ray.get([reader.read.remote([everything], copied) for reader in readers])
    after = ray.get([reader.memory.remote() for reader in readers])
    for reader in readers:
        ray.kill(reader)
    return {
        "private_growth": [late["private"] - early["private"] for early, late in zip(before, after, strict=True)],
        "proportional_growth": [
            late["proportional"] - early["proportional"] for early, late in zip(before, after, strict=True)
        ],
        "store": {
            str(late["store_file"]): late["store"] - early["store"] for early, late in zip(before, after, strict=True)
        },
    }


def copies(way: dict[str, Any], size: int) -> float:
    """Memory for the data on the whole node, over the size of the data."""
    return float((sum(way["store"].values()) + sum(way["private_growth"])) / size)


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"{figures['data_megabytes']:.0f} MB of data; {figures['machine']}, {figures['date']}")
    columns = ("way", "actors", "private growth of an actor", "PSS growth of an actor", "in the store", "copies a node")
    for column in columns:
        table.add_column(column, justify="right")
    for name, way in figures["ways"].items():
        kind, count = name.split("_")
        key = "copies_per_node_at_" if kind == "shared" else "copies_per_node_if_copied_at_"
        table.add_row(
            kind,
            count,
            *(f"{statistics.median(way[growth]) / 1e6:.1f} MB" for growth in ("private_growth", "proportional_growth")),
            f"{sum(way['store'].values()) / 1e6:.1f} MB",
            f"{figures[key + count]:.2f}",
        )
    Console(width=130).print(table)
    print(f"copies of the data on a node with 4 trials: {figures['copies_per_node_at_4']:.2f}, limit {LIMIT}")


if __name__ == "__main__":
    main()
