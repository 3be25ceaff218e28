from typing import Any

import pytest
import torch
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.models.errors import InputError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf61"}, "precision is 'bf61'; did you mean 'bf16'?"),
        ({"compile": "of"}, "compile is 'of'; did you mean 'off'?"),
    ],
)
def test_unknown_choice_is_an_error_with_the_nearest(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Execution(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrices_are_multiplied_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    one = torch.ones(2, 2)
    with Execution(precision=precision).autocast():
        assert (one @ one).dtype == dtype
    assert (one @ one).dtype == torch.float32


def test_place_is_the_device() -> None:
    assert Execution().place == torch.device("cpu")
    assert Execution(device="cuda").place == torch.device("cuda")


def test_best_precision_is_what_torch_says_of_the_processor() -> None:
    # Older torches do not say; then the processor's fp32 is always right.
    able = getattr(torch.cpu, "get_capabilities", dict)()
    precision, why = best_precision("cpu")
    assert (precision, why) in {("bf16", "AMX"), ("bf16", "AVX512-bf16"), ("fp32", "no bf16 on this CPU")}
    if able:
        assert (precision == "bf16") == bool(able.get("amx_bf16") or able.get("avx512_bf16"))
        assert (why == "AMX") == bool(able.get("amx_bf16"))
