"""What lies once in a node's object store is not copied by who reads it."""

import numpy as np
import pytest
import ray
import torch
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.splits import ImageSet

pytestmark = pytest.mark.usefixtures("shared_ray")


@ray.remote(num_cpus=0)
def mapping_of_images(splits: DataSplits) -> str:
    """The line of `/proc/self/maps` in which the pixels of `DeviceImages` lie."""
    assert isinstance(splits.train, ImageSet)
    address = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu")).images.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(place, 16) for place in line.split()[0].split("-"))
            if first <= address < last:
                return line
    return ""


def test_images_on_a_cpu_lie_in_the_object_store_of_the_node() -> None:
    data = ImageSet(np.zeros((400, 3, 32, 32), dtype=np.uint8), np.arange(400, dtype=np.int64) % 4)
    splits = ray.put(DataSplits(data, data, None, 4, (0.5,) * 3, (0.5,) * 3))
    lines = ray.get([mapping_of_images.remote(splits) for _ in range(2)])
    for line in lines:
        _, permissions, _, _, inode, *path = line.split()
        assert permissions.endswith("s")  # shared with other processes, not private
        assert "plasma" in path[0]
        assert inode == lines[0].split()[4]
