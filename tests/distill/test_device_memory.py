import pytest
import torch
from hintsearch.distill.device_memory import Halving, OutOfDeviceMemoryError, memory_errors_told, ran_out

CPU = torch.device("cpu")
TOO_MUCH = 2**60


def ask_for_too_much() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


class Work:
    """Fits if no part has more images than there is room for."""

    def __init__(self, halving: Halving, images: int, room: int) -> None:
        self.tried: list[list[tuple[int, int]]] = []
        self._halving, self._images, self._room = halving, images, room

    def __call__(self) -> int:
        bounds = self._halving.bounds(self._images)
        self.tried.append(bounds)
        for start, stop in bounds:
            if stop - start > self._room:
                ask_for_too_much()
        return len(bounds)


def test_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        ask_for_too_much()
    assert ran_out(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError("of any wording"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
        (OutOfDeviceMemoryError("the training ran out of device memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert ran_out(error) is expected


@pytest.mark.parametrize(("images", "expected"), [(8, [(0, 4), (4, 8)]), (7, [(0, 4), (4, 7)]), (3, [(0, 3)])])
def test_halves_have_as_many_images_and_at_least_the_fewest(images: int, expected: list[tuple[int, int]]) -> None:
    halving = Halving("it", CPU, fewest=2)
    assert halving.bounds(images) == [(0, images)]
    halving.halved = True
    assert halving.bounds(images) == expected


def test_what_does_not_fit_is_computed_in_halves() -> None:
    halving = Halving("it", CPU)
    work = Work(halving, 8, room=4)
    assert halving.run(8, work) == 2
    assert work.tried == [[(0, 8)], [(0, 4), (4, 8)]]


def test_what_was_halved_stays_so() -> None:
    halving = Halving("it", CPU)
    halving.run(8, Work(halving, 8, room=4))
    later = Work(halving, 8, room=100)
    assert halving.run(8, later) == 2
    assert later.tried == [[(0, 4), (4, 8)]]


def test_failed_try_is_undone_before_the_next() -> None:
    halving, done = Halving("it", CPU), []
    work = Work(halving, 8, room=4)
    halving.run(8, work, lambda: done.append(len(work.tried)))
    assert done == [1]


def test_halves_that_do_not_fit_are_one_clear_line() -> None:
    halving = Halving("the training", CPU)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        halving.run(64, Work(halving, 64, room=10))
    line = str(caught.value)
    assert line.startswith(
        "the training ran out of device memory: a batch of 64 images does not fit in halves of 32 either ("
    )
    assert f"you tried to allocate {TOO_MUCH} bytes" in line
    assert line.endswith(
        "; lower recipe.batch_size, run fewer trials at a time (resources.concurrent_trials), or compute in bf16"
    )
    assert "\n" not in line


def test_batch_that_is_too_small_to_be_halved_is_an_error() -> None:
    halving = Halving("the training", CPU, fewest=2)
    with pytest.raises(OutOfDeviceMemoryError, match=r"memory: a batch of 3 images is too small to be halved \("):
        halving.run(3, Work(halving, 3, room=2))
    assert not halving.halved


def test_error_of_anything_else_is_left_alone() -> None:
    halving, tried = Halving("it", CPU), []

    def broken() -> None:
        tried.append(1)
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match=r"^another$"):
        halving.run(8, broken)
    assert (tried, halving.halved) == ([1], False)


def test_failed_try_holds_no_tensor_when_the_next_begins() -> None:
    """As the frames of its error would."""
    halving, alive = Halving("it", CPU), []

    class Noted:
        def __del__(self) -> None:
            alive.pop()

    def work() -> int:
        if halving.halved:
            return len(alive)
        noted = Noted()
        alive.append(id(noted))
        ask_for_too_much()
        return -1

    assert halving.run(8, work) == 0


def test_error_of_memory_that_nothing_could_meet_is_one_clear_line() -> None:
    expected = pytest.raises(OutOfDeviceMemoryError, match=r"^the start ran out of device memory \(.*\); lower recipe")
    with expected, memory_errors_told("the start"):
        ask_for_too_much()


def test_other_errors_are_told_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^another$"), memory_errors_told("the start"):
        raise RuntimeError("another")


def test_share_of_a_batch_is_not_halved_and_undoes_nothing() -> None:
    halving = Halving("it", CPU, possible=False)
    work = Work(halving, images=8, room=4)
    undone: list[bool] = []
    with pytest.raises(
        OutOfDeviceMemoryError,
        match="it ran out of device memory: its share of a batch, 8 images, is not halved, for the other workers",
    ):
        halving.run(8, work, lambda: undone.append(True))
    assert work.tried == [[(0, 8)]]
    assert undone == []
    assert not halving.halved
