"""Running out of device memory: how it is told, what is freed, and the halves that batches are computed in after it.

Most trainings that run out do so by little: another trial on the same device, or a batch size chosen for another one.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..models.errors import InputError, reason
from .batches import Batch

T = TypeVar("T")

# What else than `torch.OutOfMemoryError` says so: the CPU's allocator, CUDA's own calls, and its libraries' handles.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_MEND = "lower recipe.batch_size, run fewer trials at a time (resources.concurrent_trials), or compute in bf16"


class OutOfDeviceMemoryError(InputError):
    """The device has no memory left, and halving the batch does not help; it fails one training, not a search."""


class Halving:
    """Whether the batches of something are computed in two halves: from the first time on that memory runs out.

    Args:
        what: is computed, as the error names it.
        device: whose memory it takes.
        fewest: images that a half must have; smaller batches stay whole. Batch norm knows no spread of a single image,
            so in training it is 2.
        possible: whether batches can be halved at all; of several workers each would wait for the others' halves.

    Attributes:
        halved: whether it is so.
    """

    def __init__(self, what: str, device: torch.device, fewest: int = 1, possible: bool = True) -> None:
        self.halved = False
        self._what, self._device, self._fewest, self._possible = what, device, fewest, possible

    @property
    def parts(self) -> int:
        """Of a batch that is large enough: 1 or 2."""
        return 2 if self.halved else 1

    def bounds(self, images: int) -> list[tuple[int, int]]:
        """Where the parts of a batch of that many images start and stop; of an odd number the first has one more."""
        if not self.halved or images < 2 * self._fewest:
            return [(0, images)]
        middle = (images + 1) // 2
        return [(0, middle), (middle, images)]

    def run(self, images: int, work: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
        """What `work` gives of a batch; where memory runs out, what it gives the second time, in halves.

        Args:
            images: of the batch.
            work: asks `bounds` for the parts each time.
            undo: leaves everything as it was before `work`, which failed in the middle. Not called for a batch that
                was in halves already.

        Raises:
            OutOfDeviceMemoryError: the halves do not fit either, or the batch is too small to be halved.
        """
        while True:
            # Another thread may halve in the meantime.
            was_halved = self.halved
            try:
                return work()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                said = reason(error)
            # Here, where the error is gone, and with it what its frames held.
            if was_halved or images < 2 * self._fewest or not self._possible:
                raise self._exhausted(images, said)
            if undo is not None:
                undo()
            free_memory(self._device)
            self.halved = True

    def each(self, batch: Batch, work: Callable[[Batch], T]) -> list[T]:
        """What `work`, which can be repeated, gives of each part of a batch; errors as those of `run`."""
        images = len(batch.labels)
        return self.run(images, lambda: [work(batch.part(*bounds)) for bounds in self.bounds(images)])

    def _exhausted(self, images: int, said: str) -> OutOfDeviceMemoryError:
        if not self._possible:
            tried = f"its share of a batch, {images} images, is not halved, for the other workers would wait"
        elif images < 2 * self._fewest:
            tried = f"a batch of {images} images is too small to be halved"
        else:
            tried = f"a batch of {images} images does not fit in halves of {(images + 1) // 2} either"
        return OutOfDeviceMemoryError(f"{self._what} ran out of device memory: {tried} ({said}); {_MEND}")


@contextmanager
def memory_errors_told(what: str) -> Iterator[None]:
    """Makes one clear line of an error that no halving could meet.

    Raises:
        OutOfDeviceMemoryError: memory ran out.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not ran_out(error):
            raise
        said = reason(error)
    raise OutOfDeviceMemoryError(f"{what} ran out of device memory ({said}); {_MEND}") from None


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch says that the device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more: cycles, and on a GPU the blocks that torch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
