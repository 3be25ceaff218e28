"""Where a network's last feature before its logits is found."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, reason
from .feature_maps import first_tensor


def classifier_path(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """The path of the classifier: the module whose input is the penultimate feature.

    It is the last linear layer or 1×1 convolution that the logits of an image go through, and gives as many values, or
    maps, as there are logits. A convolution's maps are pooled to the logits afterwards.

    Args:
        model: any network of images; each module's mode and hooks are left as they are.
        image_shape: (channels, height, width) of one image.

    Returns:
        Such as `fc` or `classifier.6`.

    Raises:
        InputError: a network that does not give logits [B, classes] or ends otherwise, or cannot read such images.
    """
    classifiers: dict[nn.Module, str] = {
        module: path for path, module in model.named_modules() if path and _may_classify(module)
    }
    ran: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        ran.append(module)

    with evaluating(model), torch.no_grad():
        with _hooked(list(classifiers), note):
            classes = _logits_of_zeros(model, image_shape).shape[1]
        # By their last runs, the last first.
        for module in dict.fromkeys(reversed(ran)):
            with _hooked([module], _spoil):
                spoilt = _logits_of_zeros(model, image_shape).isnan().all()
            if spoilt:
                if _width(module) == classes:
                    return classifiers[module]
                raise InputError(
                    f"{type(model).__name__} gives {classes} logits, but its last linear layer, "
                    f"{classifiers[module]!r}, gives {_width(module)} values; let the network end with a linear layer "
                    "or a 1×1 convolution"
                )
    raise InputError(
        f"{type(model).__name__} makes its logits by no linear layer; let the network end with a linear layer "
        "or a 1×1 convolution"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, and after an error, each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _may_classify(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _width(module: nn.Module) -> int:
    """Values that it gives for each image, token or pixel."""
    return module.out_features if isinstance(module, nn.Linear) else int(module.get_parameter("weight").shape[0])


def _spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """In the place of what a module gives, what no later module can hide."""
    return torch.full_like(output, torch.nan)


@contextmanager
def _hooked(modules: list[nn.Module], hook: Any) -> Iterator[None]:
    with ExitStack() as handles:
        for module in modules:
            handles.enter_context(module.register_forward_hook(hook))
        yield


def _logits_of_zeros(model: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """Logits [1, classes] of a black image."""
    like = next(model.parameters(), torch.empty(0))
    try:
        output = model(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = "×".join(map(str, image_shape))
        raise InputError(
            f"{type(model).__name__} cannot read images of {shape} ({reason(error)}); change data or model"
        ) from error
    logits = first_tensor(output)
    if logits is None or logits.dim() != 2:
        given = type(output).__name__ if logits is None else f"a tensor {list(logits.shape)}"
        raise InputError(
            f"{type(model).__name__} gives {given} for one image, but logits are [B, classes]; "
            "let the network give its logits"
        )
    return logits
