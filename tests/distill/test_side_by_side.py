import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hintsearch.distill.side_by_side import AHEAD, at_once, for_all

THREADS = [1, 2, 3]


class Broken(Exception):  # noqa: N818
    """What goes wrong here."""


def fail(_item: int) -> int:
    raise Broken


@pytest.mark.parametrize("threads", THREADS)
def test_every_share_is_given_every_product_in_order(threads: int) -> None:
    found: list[list[int]] = [[] for _ in range(threads)]
    for_all(range(50), lambda item: item * item, [one.append for one in found])
    assert found == [[item * item for item in range(50)]] * threads


@pytest.mark.parametrize("threads", THREADS)
def test_every_item_is_made_once(threads: int) -> None:
    made: list[int] = []
    for_all(range(50), made.append, [lambda _made: None] * threads)
    assert sorted(made) == list(range(50))


def test_items_are_made_in_several_threads_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    for_all(range(2), lambda _item: both.wait(), [lambda _made: None] * 2)
    assert both.n_waiting == 0


def test_slow_share_does_not_make_the_products_pile_up() -> None:
    made: list[int] = []
    piled: list[int] = []
    read: list[int] = []

    def slowly(item: int) -> None:
        time.sleep(0.002)
        read.append(item)
        piled.append(len(made) - len(read))

    def make(item: int) -> int:
        made.append(item)
        return item

    for_all(range(60), make, [slowly, lambda _made: None])
    # What is in hand is not forgotten yet.
    assert max(piled) <= 2 * AHEAD
    assert len(read) == 60


@pytest.mark.parametrize("threads", THREADS)
def test_nothing_to_read_is_no_error(threads: int) -> None:
    for_all([], fail, [fail] * threads)


@pytest.mark.parametrize("threads", THREADS)
def test_error_in_making_ends_all(threads: int) -> None:
    with pytest.raises(Broken):
        for_all(range(5), fail, [lambda _made: None] * threads)


@pytest.mark.parametrize("threads", THREADS)
def test_error_of_the_items_ends_all(threads: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise Broken

    with pytest.raises(Broken):
        for_all(items(), lambda item: item, [lambda _made: None] * threads)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_error_of_one_share_ends_all(failing: int) -> None:
    shares: list[Callable[[int], object]] = [lambda _made: None] * 3
    shares[failing] = fail
    with pytest.raises(Broken):
        for_all(iter(int, 1), lambda item: item, shares)


@pytest.mark.parametrize("threads", THREADS)
def test_work_at_once_gives_results_in_order(threads: int) -> None:
    assert at_once(lambda item: item + 1, [3, 1, 2], threads) == [4, 2, 3]


def test_threads_compute_with_as_many_torch_threads_as_the_caller() -> None:
    found: list[int] = []
    for_all(range(4), lambda item: item, [lambda _made: found.append(torch.get_num_threads())] * 2)
    assert set(found) == {torch.get_num_threads()}
