"""Weights in files: loading what the field writes, saving safetensors, one hash that no file format changes."""

import hashlib
import pickle
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError, reason
from .files import replacing

StateDict = dict[str, Tensor]

_COUNTER = "num_batches_tracked"


def weights_sha256(state: StateDict) -> str:
    """SHA-256 over names, types, shapes and values in the order of the names, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, state: StateDict) -> None:
    """Writes safetensors, whole or not at all."""
    with replacing(path) as temporary:
        # Cloned, for safetensors refuses tensors that share memory, as tied layers do.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary)


def read_weights(path: Path) -> StateDict:
    """Reads safetensors or a torch file holding a state dict, bare or below `model` or `state_dict`.

    A `module.` prefix of every name, as nn.DataParallel leaves it, is removed. Nothing is unpickled but tensors.

    Raises:
        InputError: no such file, or not weights.
    """
    if not path.is_file():
        raise InputError(f"there is no weights file {path}; give the path of a .safetensors or .pt file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:
        # A damaged file makes the decoders raise anything: IndexError, AssertionError, struct.error, ...
        raise InputError(
            f"{path} cannot be read as weights ({_what_is_wrong(error)}); "
            "give a .safetensors file or a state dict saved by torch.save"
        ) from error
    if content and all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def _what_is_wrong(error: Exception) -> str:
    """What a decoder's error means: torch's own say how to load unsafely, or no more than a byte's number."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return "it holds Python objects beside tensors, which could run code and are not read"
    if isinstance(error, (pickle.UnpicklingError, LookupError, EOFError)):
        return "it is no file of torch.save"
    return reason(error)


def _load_torch(path: Path) -> StateDict:
    # RepDistiller's last checkpoint also holds its command line, as a Namespace: names and values, no code.
    with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
        # Torch warns of pickle's version before it finds that the file is none.
        warnings.simplefilter("ignore", UserWarning)
        content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise ValueError("it holds no state dict")
    return dict(content)


def apply_weights(model: nn.Module, state: StateDict, origin: str) -> None:
    """Loads `state` into `model`, all names and shapes equal.

    Only the counters of batch norms may be missing, as in files written before there were any; they start at 0.

    Args:
        model: what receives the weights.
        state: the weights.
        origin: where they come from, for the message.

    Raises:
        InputError: names or shapes differ; names the first differences.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(_COUNTER)]
    unknown = [name for name in state if name not in own]
    shaped = [
        f"{name} is {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [f"lacks {', '.join(missing[:3])}"] * bool(missing)
    problems += [f"has {', '.join(unknown[:3])} that the model lacks"] * bool(unknown)
    problems += shaped[:3]
    if problems:
        raise InputError(f"the weights of {origin} do not fit {type(model).__name__}: {'; '.join(problems)}")
    counters = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith(_COUNTER)}
    model.load_state_dict(counters | state)
