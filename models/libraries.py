"""Networks of torchvision and timm, named `torchvision:NAME` and `timm:NAME`, and the weights these offer."""

import re
from types import ModuleType
from typing import Any

from torch import nn

from .errors import InputError, nearest, reason
from .preprocessing import INTERPOLATIONS, Preprocessing
from .weights import StateDict

_TORCHVISION = "torchvision:"
_TIMM = "timm:"

# Their second and third outputs exist in training only, and would not be distilled.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
# The default weights of this one are for images of another size than the network is built for.
_FITTING_WEIGHTS = {"vit_h_14": "IMAGENET1K_SWAG_LINEAR_V1"}
# How the published weights of DenseNet call what the network calls norm1, conv1, ...
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def is_library_name(name: str) -> bool:
    """Whether the name is one of torchvision's or timm's, right or wrong."""
    return name.startswith((_TORCHVISION, _TIMM))


def check_library_model(name: str) -> None:
    """Checks `torchvision:NAME` or `timm:NAME`.

    Raises:
        InputError: no classification model of that name; timm is not installed.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        known = _torchvision_names()
        found = model in known
    else:
        timm = _timm(name)
        known = [*timm.list_models(), *timm.list_pretrained()]
        found = model in known
    if not found:
        raise InputError(f"unknown model {name!r}; {nearest(name, [f'{library}:{other}' for other in known])}")


def build_library_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """The network, freshly initialised from torch's global generator; without auxiliary heads.

    Args:
        name: `torchvision:NAME` or `timm:NAME`, timm's with or without a tag.
        num_classes: outputs.
        in_channels: image channels. Where torchvision's first convolution takes another number, it is replaced by a
            new one of the same settings.

    Raises:
        InputError: as `check_library_model`; a network that cannot be built with so many classes or channels.
    """
    check_library_model(name)
    library, _, model = name.partition(":")
    try:
        if library == "timm":
            return _built_by_timm(name, num_classes=num_classes, in_chans=in_channels)
        network = _built_by_torchvision(model, num_classes)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be built for {num_classes} classes and {in_channels} channels ({reason(error)}); "
            "choose another model"
        ) from error
    _take_channels(network, in_channels, name)
    return network


def pretrained_weights(name: str) -> StateDict:
    """The weights that the library offers for its network, downloaded once into the library's own cache.

    They fit what `build_library_model` builds for as many classes and channels as they were trained for.

    Args:
        name: `torchvision:NAME`, for torchvision's default weights, or `timm:NAME`, with a tag or for timm's default.

    Raises:
        InputError: a network that has none, a download that fails, a file that holds more than weights; as
            `check_library_model`.
    """
    _check_offers_weights(name)
    try:
        return _torchvision_state(name) if name.startswith(_TORCHVISION) else _timm_state(name)
    except Exception as error:
        # Each library raises its own errors, and those of what it downloads and decodes with.
        raise InputError(
            f"the weights of {name} cannot be loaded ({reason(error)}); "
            "connect to the network, or give the path of a weights file"
        ) from error


def pretrained_preprocessing(name: str) -> Preprocessing:
    """What the images of `pretrained_weights(name)` must look like.

    The libraries' own evaluation resizes to somewhat more and crops the middle; here the whole image is resized.

    Raises:
        InputError: as `pretrained_weights`, but for the download.
    """
    _check_offers_weights(name)
    if name.startswith(_TORCHVISION):
        return _torchvision_preprocessing(name.removeprefix(_TORCHVISION))
    settings = _timm(name).get_pretrained_cfg(name.removeprefix(_TIMM))
    _, height, width = settings.input_size
    interpolation = settings.interpolation if settings.interpolation in INTERPOLATIONS else "bicubic"
    return Preprocessing(tuple(settings.mean), tuple(settings.std), (height, width), interpolation)


def _check_offers_weights(name: str) -> None:
    if not is_library_name(name):
        raise InputError(
            f"{name} comes without weights, only networks of torchvision and timm have any; "
            "give the path of a weights file"
        )
    check_library_model(name)
    model = name.removeprefix(_TIMM)
    if name.startswith(_TIMM) and not _timm(name).models.is_model_pretrained(model):
        raise InputError(f"timm has no weights for {model}; give the path of a weights file")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _built_by_torchvision(model: str, num_classes: int) -> nn.Module:
    from torchvision import models

    options = {"aux_logits": False, "init_weights": True} if model in _WITH_AUXILIARY_HEADS else {}
    network: nn.Module = models.get_model(model, weights=None, num_classes=num_classes, **options)
    return network


def _take_channels(network: nn.Module, in_channels: int, name: str) -> None:
    # Typed Any: a convolution's settings are tuples of any length, but it takes pairs.
    first: Any
    path, first = next((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == in_channels:
        return
    if first.groups != 1:
        raise InputError(
            f"{name} takes images of {first.in_channels} channels, not {in_channels}: its first convolution is "
            "grouped; choose another model"
        )
    made = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,
        first.stride,
        first.padding,
        first.dilation,
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
    )
    network.set_submodule(path, made)


def _torchvision_entry(model: str) -> Any:
    from torchvision import models

    offered = models.get_model_weights(model)
    return offered[_FITTING_WEIGHTS[model]] if model in _FITTING_WEIGHTS else offered.DEFAULT


def _torchvision_state(name: str) -> StateDict:
    entry = _torchvision_entry(name.removeprefix(_TORCHVISION))
    state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    return {
        _OLD_DENSENET_NAME.sub(r"\1\2", path): tensor
        for path, tensor in state.items()
        if not path.startswith(_AUXILIARY_HEADS)
    }


def _torchvision_preprocessing(model: str) -> Preprocessing:
    preset = _torchvision_entry(model).transforms()
    mean, sd = tuple(preset.mean), tuple(preset.std)
    if model in _WITH_AUXILIARY_HEADS:
        # With its own weights torchvision builds these two so that they turn the usual normalisation into this one.
        mean, sd = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    [side] = preset.crop_size
    return Preprocessing(mean, sd, (side, side), preset.interpolation.value)


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{name} needs timm, which is not installed; run pip install 'hintsearch[timm]'") from error
    module: ModuleType = timm
    return module


def _built_by_timm(name: str, **settings: Any) -> nn.Module:
    network: nn.Module = _timm(name).create_model(name.removeprefix(_TIMM), **settings)
    return network


def _timm_state(name: str) -> StateDict:
    state: StateDict = _built_by_timm(name, pretrained=True).state_dict()
    return state
