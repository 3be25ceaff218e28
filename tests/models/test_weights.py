import io
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.weights import apply_weights, read_weights, save_weights, weights_sha256
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Write = Callable[[str, bytes], Path]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def state() -> dict[str, Tensor]:
    return {
        "conv.weight": torch.arange(12.0).reshape(3, 4),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def written(path: Path, form: str) -> Path:
    prefixed = {f"module.{name}": tensor for name, tensor in state().items()}
    contents: dict[str, Any] = {
        "bare": state(),
        "model": {"model": state(), "epoch": 240},
        "state_dict": {"state_dict": state(), "optimizer": {"lr": 0.1}},
        "prefix": prefixed,
        "model with prefix": {"model": prefixed},
        "last checkpoint": {"opt": Namespace(model="resnet8", lr=0.05, stages=[1, 2]), "model": state()},
    }
    if form.startswith("safetensors"):
        save_file(prefixed if "prefix" in form else state(), path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if form == "old torch":
        torch.save(state(), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(contents[form], path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "safetensors",
        "safetensors with prefix",
        "bare",
        "model",
        "state_dict",
        "prefix",
        "model with prefix",
        "last checkpoint",
        "old torch",
    ],
)
def test_hash_is_the_same_whatever_file_the_weights_lie_in(tmp_path: Path, form: str) -> None:
    assert weights_sha256(read_weights(written(tmp_path / "weights.pt", form))) == weights_sha256(state())


def test_hash_does_not_depend_on_the_order_of_the_names() -> None:
    assert weights_sha256(dict(reversed(state().items()))) == weights_sha256(state())


def test_hash_does_not_depend_on_the_memory_layout() -> None:
    transposed = state() | {"conv.weight": state()["conv.weight"].t().contiguous().t()}
    assert weights_sha256(transposed) == weights_sha256(state())


@pytest.mark.parametrize(
    "change",
    [
        {"conv.weight": torch.arange(12.0).reshape(3, 4).index_fill(0, torch.tensor([1]), 0.5)},
        {"conv.weight": torch.arange(12.0).reshape(4, 3)},
        {"bn.num_batches_tracked": torch.tensor(8)},
        {"half": state()["half"].view(torch.int16)},
        {"extra": torch.zeros(0)},
    ],
    ids=["value", "shape", "buffer", "type", "name"],
)
def test_hash_differs_for_changed_weights(change: dict[str, Tensor]) -> None:
    assert weights_sha256(state() | change) != weights_sha256(state())


def test_saved_weights_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    save_weights(tmp_path / "new" / "weights.safetensors", state())
    read = read_weights(tmp_path / "new" / "weights.safetensors")
    assert read.keys() == state().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state().items())


def test_saved_weights_may_share_memory(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    save_weights(tmp_path / "weights.safetensors", {"encoder": tied, "decoder": tied})
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["decoder"], tied)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "absent.pt"
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert str(caught.value) == f"there is no weights file {path}; give the path of a .safetensors or .pt file"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@given(content=st.binary(max_size=200))
@settings(deadline=None, max_examples=60)
def test_binary_rubbish_is_an_error(scratch_file: Write, name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=r"cannot be read as weights \(.+\); give a .safetensors file or a state dict"):
        read_weights(scratch_file(name, content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
@given(share=st.floats(0, 0.99))
@settings(deadline=None, max_examples=40)
def test_file_that_is_cut_short_is_an_error(scratch_file: Write, zipped: bool, share: float) -> None:
    content = saved(state(), _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(scratch_file("cut.pt", content[: int(share * len(content))]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(place=st.floats(0, 0.999), value=st.integers(0, 255))
@settings(deadline=None, max_examples=100)
def test_damaged_byte_gives_weights_or_an_error_of_ours(scratch_file: Write, place: float, value: int) -> None:
    content = bytearray(saved(state(), _use_new_zipfile_serialization=False))
    content[int(place * len(content))] = value
    with suppress(InputError):
        read = read_weights(scratch_file("damaged.pt", bytes(content)))
        assert all(isinstance(tensor, Tensor) for tensor in read.values())


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3}, {"model": {"a": "b"}}, {0: torch.zeros(2)}])
def test_file_without_a_state_dict_is_an_error(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"cannot be read as weights \(it holds no state dict\)"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_pickle_is_an_error(tmp_path: Path, dump: Callable[[Any, Path], Any]) -> None:
    dump({"weight": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "weights.pt")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(InputError):
        read_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload of this test is dead"


def test_fitting_weights_are_applied() -> None:
    model = nn.Linear(2, 2)
    weights = {"weight": torch.eye(2), "bias": torch.ones(2)}
    apply_weights(model, weights, "w.pt")
    assert torch.equal(model.weight, torch.eye(2))
    assert torch.equal(model.bias, torch.ones(2))


def test_weights_that_do_not_fit_are_an_error_naming_the_differences() -> None:
    weights = {"weight": torch.zeros(1, 2), "scale": torch.zeros(2)}
    with pytest.raises(InputError) as caught:
        apply_weights(nn.Linear(2, 2), weights, "w.pt")
    assert str(caught.value) == (
        "the weights of w.pt do not fit Linear: "
        "lacks bias; has scale that the model lacks; weight is [1, 2] instead of [2, 2]"
    )


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = nn.Linear(2, 2)
    before = weights_sha256(model.state_dict())
    with pytest.raises(InputError):
        apply_weights(model, {"weight": torch.eye(2), "bias": torch.zeros(3)}, "w.pt")
    assert weights_sha256(model.state_dict()) == before


def test_long_differences_are_cut_to_three_names() -> None:
    model = nn.Sequential(*(nn.PReLU() for _ in range(5)))
    with pytest.raises(InputError, match=r"Sequential: lacks 0.weight, 1.weight, 2.weight$"):
        apply_weights(model, {}, "w.pt")


def test_counters_of_norms_may_be_missing_as_in_old_files() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    model.get_buffer("0.num_batches_tracked").fill_(5)
    old = {f"0.{name}": torch.full((2,), 3.0) for name in ("weight", "bias", "running_mean", "running_var")}
    apply_weights(model, old, "w.pt")
    assert model.state_dict()["0.num_batches_tracked"] == 0
    assert torch.equal(model.state_dict()["0.running_var"], torch.full((2,), 3.0))


def test_counters_of_norms_are_applied() -> None:
    model = nn.BatchNorm2d(2)
    apply_weights(model, model.state_dict() | {"num_batches_tracked": torch.tensor(7)}, "w.pt")
    assert model.state_dict()["num_batches_tracked"] == 7


def test_pickled_object_is_refused_without_torchs_hint_to_load_it_unsafely(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "whole.pt")
    assert "(it holds Python objects beside tensors, which could run code and are not read)" in str(caught.value)


def test_text_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "readme.pth").write_text("these are no weights\n")
    with pytest.raises(InputError, match=r"\(it is no file of torch\.save\)"):
        read_weights(tmp_path / "readme.pth")
