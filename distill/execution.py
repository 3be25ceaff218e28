"""How the arithmetic of a training is done: where, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from ..models.errors import InputError, nearest
from .workers import ALONE, Workers

Precision = Literal["fp32", "bf16"]
DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
COMPILE_MODES = ("off", "default", "reduce-overhead")


@dataclass(frozen=True)
class Execution:
    """What changes a training's speed, and its result by rounding alone.

    Attributes:
        device: `cpu` or `cuda`.
        precision: `bf16` runs both networks under autocast; losses, weights and optimizer stay float32.
        compile: `off`; `default` for torch.compile; `reduce-overhead` for torch.compile with CUDA graphs.
        fold_teacher: the teacher's batch norms are folded into its convolutions.
        workers: the processes that train together, each on its share of a batch.

    Raises:
        InputError: an unknown device, precision or compile mode.
    """

    device: str = "cpu"
    precision: str = "fp32"
    compile: str = "off"
    fold_teacher: bool = True
    workers: Workers = ALONE

    def __post_init__(self) -> None:
        for name, value, options in (
            ("device", self.device, DEVICES),
            ("precision", self.precision, PRECISIONS),
            ("compile", self.compile, COMPILE_MODES),
        ):
            if value not in options:
                raise InputError(f"{name} is {value!r}; {nearest(value, options)}")

    @property
    def place(self) -> torch.device:
        """The device as torch has it."""
        return torch.device(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks run."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.place.type, torch.bfloat16)


def best_precision(device: str) -> tuple[Precision, str]:
    """The fastest precision that the hardware of this process has, and what makes it so.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        For example `("bf16", "AMX")`, or `("fp32", "no bf16 on this CPU")`.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return ("bf16", name) if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", name)
    # Torch emulates bf16 on other CPUs, many times slower than fp32.
    unit = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-bf16"}
    able = [said for key, said in unit.items() if _cpu_has(key)]
    return ("bf16", able[0]) if able else ("fp32", "no bf16 on this CPU")


def _cpu_has(capability: str) -> bool:
    # Older torches tell it by private functions of their own only.
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return bool(tell().get(capability, False))
    private = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}[capability]
    return bool(getattr(torch.cpu, private, bool)())
