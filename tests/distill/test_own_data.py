import pickle
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hintsearch.distill.data import DataSpec, check_data_name, load_data
from hintsearch.distill.lazy_images import Decoding, LazyImages
from hintsearch.distill.own_data import OwnItems, read_own_data
from hintsearch.models.errors import InputError

NOWHERE = Path("no-such-folder")
HEADER = """
import threading
import numpy as np
import torch
from PIL import Image

READ = []
AT_ONCE = []


class Numbered:
    '''Images of 4×5 pixels that all are the image's number; labels 0, 1, 2 in turn.'''

    def __init__(self, count=30, start=0, make=lambda pixels: pixels, shape=(4, 5, 3)):
        self.numbers, self.make, self.shape = range(start, start + count), make, shape

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        READ.append(self.numbers[index])
        return self.make(np.full(self.shape, self.numbers[index], np.uint8)), self.numbers[index] % 3


class WithTargets(Numbered):
    @property
    def targets(self):
        return [number % 3 for number in self.numbers]


def whole():
    return Numbered(30), Numbered(6, 100), Numbered(9, 200)


def train_only():
    return {"train": WithTargets()}
"""


@pytest.fixture
def code(tmp_path: Path) -> Any:
    """Writes `HEADER` and more lines into a file; gives the name of one of its functions."""

    def write(function: str, lines: str = "") -> str:
        (tmp_path / "own.py").write_text(HEADER + lines)
        return f"{tmp_path / 'own.py'}:{function}"

    return write


def numbers(split: Any) -> list[int]:
    """Which of the `Numbered` images these are."""
    return sorted(split.read(np.arange(len(split)))[:, 0, 0, 0].tolist())


def items(name: str) -> OwnItems:
    train = read_own_data(name).train
    assert isinstance(train, OwnItems)
    return train


def module_of(source: OwnItems) -> Any:
    """The namespace of the file that the data set comes from."""
    return type(source._loaded()).__getitem__.__globals__


def error_of(name: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_data(DataSpec(name, **changes), NOWHERE)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_splits_of_ones_own_are_used_as_they_are(code: Any) -> None:
    splits = load_data(DataSpec(code("whole")), NOWHERE)
    assert numbers(splits.train) == list(range(30))
    assert numbers(splits.validation) == list(range(100, 106))
    assert numbers(splits.test) == list(range(200, 209))
    assert (splits.image_shape, splits.classes) == ((3, 4, 5), 3)
    for split in (splits.train, splits.validation):
        assert (split.read(np.arange(len(split)))[:, 0, 0, 0] % 3 == split.labels).all()


def test_splits_that_are_not_given_are_carved_by_seed(code: Any) -> None:
    splits, other = (load_data(DataSpec(code("train_only"), seed=seed), NOWHERE) for seed in (0, 1))
    parts = [numbers(part) for part in (splits.train, splits.validation, splits.test)]
    assert sorted(number for part in parts for number in part) == list(range(30))
    assert [len(part) for part in parts] == [18, 6, 6]
    assert numbers(other.validation) != parts[1]


def test_fraction_of_the_training_images_leaves_ones_own_validation_alone(code: Any) -> None:
    splits = load_data(DataSpec(code("whole"), train_fraction=0.5), NOWHERE)
    assert np.bincount(splits.train.labels).tolist() == [5, 5, 5]
    assert numbers(splits.validation) == list(range(100, 106))


@pytest.mark.parametrize(
    "make",
    [
        "pixels",
        "Image.fromarray(pixels)",
        "torch.from_numpy(pixels).permute(2, 0, 1)",
    ],
)
def test_image_may_be_an_array_a_tensor_or_of_pillow(code: Any, make: str) -> None:
    name = code("made", f"def made():\n    return Numbered(make=lambda pixels: {make}), None, None\n")
    splits = load_data(DataSpec(name), NOWHERE)
    assert splits.image_shape == (3, 4, 5)
    assert len(set(numbers(splits.train))) == 18


@pytest.mark.parametrize("make", ["pixels[..., 0]", "pixels[..., :1]", "Image.fromarray(pixels[..., 0])"])
def test_grey_images_have_one_channel(code: Any, make: str) -> None:
    name = code("made", f"def made():\n    return Numbered(make=lambda pixels: {make}), None, None\n")
    assert load_data(DataSpec(name), NOWHERE).image_shape == (1, 4, 5)


def test_pillow_images_get_the_channels_of_the_first(code: Any) -> None:
    lines = """
def mixed():
    return Numbered(make=lambda pixels: Image.fromarray(pixels).convert("L" if pixels[0, 0, 0] % 2 else "RGB"))
def made():
    return mixed(), None, None
"""
    assert load_data(DataSpec(code("made", lines)), NOWHERE).image_shape == (3, 4, 5)


def test_labels_may_be_arrays_or_tensors_of_integers(code: Any) -> None:
    lines = """
class Tensors(Numbered):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, (torch.tensor(label) if index % 2 else np.int32(label))
def made():
    return Tensors(), None, None
"""
    assert items(code("made", lines)).labels.tolist() == [number % 3 for number in range(30)]


def test_items_are_not_read_for_labels_that_the_data_set_has(code: Any) -> None:
    source = items(code("train_only"))
    # One item is, for the number of channels.
    assert module_of(source)["READ"] == [0]
    assert source.labels.tolist() == [number % 3 for number in range(30)]


def test_each_item_is_decoded_once_when_all_are_loaded(code: Any) -> None:
    source = items(code("train_only"))
    read = module_of(source)["READ"]
    read.clear()
    LazyImages(source, Decoding((4, 5))).decoded(workers=3)
    assert Counter(read) == Counter(range(30))


def test_items_are_read_by_one_thread_at_a_time_unless_the_data_set_is_thread_safe(code: Any) -> None:
    lines = """
import time
class Slow(WithTargets):
    def __getitem__(self, index):
        AT_ONCE.append(1)
        time.sleep(0.002)
        found = super().__getitem__(index), len(AT_ONCE)
        AT_ONCE.pop()
        MOST.append(found[1])
        return found[0]
class Safe(Slow):
    thread_safe = True
MOST = []
def slow():
    return Slow(), None, None
def safe():
    return Safe(), None, None
"""
    most = {}
    for function in ("slow", "safe"):
        source = items(code(function, lines))
        LazyImages(source, Decoding((4, 5))).decoded(workers=4)
        most[function] = max(module_of(source)["MOST"])
    assert most["slow"] == 1
    assert most["safe"] > 1


def test_data_that_does_not_fit_is_read_again_in_other_processes(code: Any) -> None:
    """The class of the file is unknown there, so that the data set itself must not travel."""
    splits = load_data(DataSpec(code("whole"), size=4, memory_gb=0), NOWHERE)
    assert isinstance(splits.train, LazyImages)
    content = pickle.dumps(splits.without_test())
    assert b"Numbered" not in content
    there = pickle.loads(content)
    assert numbers(there.train) == list(range(30))
    assert there.sha256() == splits.sha256()


def test_several_threads_load_the_data_set_once(code: Any, tmp_path: Path) -> None:
    lines = f"""
import time
def counted():
    with open({str(tmp_path / "calls")!r}, "a") as file:
        file.write("called ")
    time.sleep(0.05)
    return WithTargets(), None, None
"""
    source = pickle.loads(pickle.dumps(items(code("counted", lines))))
    threads = [threading.Thread(target=source.pixels, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "calls").read_text() == "called called "


def test_hash_follows_the_code_and_the_labels(code: Any) -> None:
    one = items(code("whole")).fingerprint()
    assert one == items(code("whole")).fingerprint()
    part = items(code("whole")).subset(np.arange(29)).fingerprint()
    assert len({one, part, items(code("whole", "# changed\n")).fingerprint()}) == 3


def test_unreadable_items_are_left_out_up_to_the_limit(code: Any, caplog: pytest.LogCaptureFixture) -> None:
    lines = """
class Damaged(WithTargets):
    def __getitem__(self, index):
        if index in (0, 7):
            raise OSError("image file is truncated")
        return super().__getitem__(index)
def made():
    return Damaged(), None, None
"""
    name = code("made", lines)
    splits = load_data(DataSpec(name, unreadable=2), NOWHERE)
    assert sorted(numbers(splits.train) + numbers(splits.validation) + numbers(splits.test)) == [
        number for number in range(30) if number not in (0, 7)
    ]
    assert f"item 7 of train of {name} cannot be read (image file is truncated)" in caplog.text
    assert error_of(name, unreadable=1).startswith("2 images cannot be read (")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("return 3", "returns int, but must return (train, validation, test), or a mapping with these keys; "),
        ("return Numbered(), None", "returns tuple, but must return (train, validation, test), or"),
        ("return None, None, None", "returns dict with keys ['test', 'train', 'validation'], but must return"),
        ("return {'training': Numbered()}", "returns dict with keys ['training'], but must return"),
        ("raise RuntimeError('no disk')", "failed (RuntimeError: no disk); mend it"),
        ("return 1 / 0", "failed (ZeroDivisionError: division by zero); mend it"),
    ],
)
def test_function_that_returns_something_else_or_fails_is_an_error(code: Any, lines: str, message: str) -> None:
    name = code("made", f"def made():\n    {lines}\n")
    assert error_of(name).startswith(f"data set {name!r} {message}")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("iter([])", "train of {name} is list_iterator, but must be a data set with at least one item, "),
        ("[]", "train of {name} is list, but must be a data set with at least one item, `len(dataset)` and"),
        ("[3]", "item 0 of train of {name} is int, but must be a pair (image, label)"),
        (
            "Numbered(make=lambda pixels: pixels / 255)",
            "item 0 of train of {name}: the image is float64 [4, 5, 3], but must be a Pillow image, a uint8 array ",
        ),
        (
            "Numbered(make=lambda pixels: torch.zeros(3, 4, 5))",
            "item 0 of train of {name}: the image is float32 [3, 4, 5], but must be a Pillow image, a uint8 array ",
        ),
        ("Numbered(make=str)", "item 0 of train of {name}: the image is "),
        ("[(np.zeros((4, 5), np.uint8), 'cat')] * 9", "the labels of train of {name} are <U3 [9], but must be 9 int"),
        ("[(np.zeros((4, 5), np.uint8), 0.5)] * 9", "the labels of train of {name} are float64 [9], but must be 9 "),
        ("Numbered(make=lambda pixels: pixels[: 1 + pixels[0, 0, 0] % 2])", "item "),
        ("Numbered(make=lambda pixels: pixels[..., : 1 + pixels[0, 0, 0] % 2])", "item "),
    ],
)
def test_data_set_of_another_kind_is_an_error(code: Any, train: str, message: str) -> None:
    name = code("made", f"def made():\n    return {train}, None, None\n")
    assert error_of(name).startswith(message.format(name=name))


def test_number_of_targets_must_be_that_of_the_items(code: Any) -> None:
    lines = "def made():\n    found = Numbered()\n    found.targets = [0, 1]\n    return found, None, None\n"
    name = code("made", lines)
    assert error_of(name) == f"the `targets` of train of {name} are int64 [2], but must be 30 integers from 0"


def test_negative_label_is_an_error_that_names_the_item(code: Any) -> None:
    lines = "def made():\n    found = Numbered()\n    found.labels = [-1] + 29 * [0]\n    return found, None, None\n"
    name = code("made", lines)
    assert error_of(name) == (
        f"item 0 of train of {name} has the label -1, but labels must be 0..0; mend the labels, or give data.classes"
    )


def test_unreadable_item_without_targets_is_an_error_with_the_mend(code: Any) -> None:
    lines = """
class Damaged(Numbered):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("truncated")
        return super().__getitem__(index)
def made():
    return Damaged(), None, None
"""
    name = code("made", lines)
    assert error_of(name, unreadable=5) == (
        f"item 7 of train of {name} cannot be read (truncated), so that its label is not known; mend it, or give the "
        "data set an attribute `targets` with all labels"
    )


def test_checking_the_name_runs_no_code(code: Any, tmp_path: Path) -> None:
    name = code("whole", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    check_data_name(name)
    assert not (tmp_path / "ran").exists()
    load_data(DataSpec(name), NOWHERE)
    assert (tmp_path / "ran").exists()


def test_file_that_is_not_there_is_an_error() -> None:
    assert error_of("no_such_file.py:data").startswith("data set 'no_such_file.py:data': there is no file")
