"""The networks a study can name, and how to build one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn

from .channel_counts import scaled
from .cnn32 import Cnn32
from .errors import InputError, reason
from .four_stage_resnet import BasicBlock, Bottleneck, FourStageResNet
from .libraries import build_library_model, check_library_model, is_library_name
from .mobilenet import MobileNetV2
from .own_code import check_own_code, is_own_code, load_own_code
from .preprocessing import Preprocessing
from .registry import Registry
from .resnet import CifarResNet
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .vgg import Vgg
from .wide_resnet import WideResNet


class Factory(Protocol):
    """Builds a network of the zoo."""

    def __call__(self, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
        """A freshly initialised network, whose weights depend on torch's global generator only."""


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a network, and to feed it.

    Attributes:
        name: of the zoo (`resnet20`), of a library (`torchvision:resnet34`, `timm:resnet18.a1_in1k`), or one's own
            factory as `path/to/file.py:function` or `package.module:function`.
        num_classes: outputs.
        in_channels: image channels.
        width: factor on every inner channel count; for networks of the zoo only.
        preprocessing: what its input must look like; None: as the data set's own normalisation has it.
    """

    name: str
    num_classes: int
    in_channels: int
    width: float = 1.0
    preprocessing: Preprocessing | None = None

    def input_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of its input, made of images of that shape."""
        size = self.preprocessing.size if self.preprocessing else None
        return image_shape if size is None else (image_shape[0], *size)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, without `preprocessing` where there is none; `from_dict` is the inverse."""
        content = asdict(self)
        del content["preprocessing"]
        if self.preprocessing is not None:
            plain = self.preprocessing.to_dict()
            content["preprocessing"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`, also after a way through JSON or YAML."""
        preprocessing = content.get("preprocessing")
        made = None if preprocessing is None else Preprocessing.from_dict(preprocessing)
        return cls(**{**content, "preprocessing": made})


MODELS: Registry[Factory] = Registry("model")

_RESNET = "He et al. 2016, arXiv 1512.03385"
_WIDE_RESNET = "Zagoruyko and Komodakis 2016, arXiv 1605.07146"
_VGG = "Simonyan and Zisserman 2015, arXiv 1409.1556"
_MOBILENET_V2 = "Sandler et al. 2018, arXiv 1801.04381"
_SHUFFLENET_V1 = "Zhang et al. 2018, arXiv 1707.01083"
_SHUFFLENET_V2 = "Ma et al. 2018, arXiv 1807.11164"
_REPDISTILLER = "Tian et al. 2020, arXiv 1910.10699"
_INDISTILL = "Sarridis et al. 2022, arXiv 2205.10003"


def _register_resnet(depth: int, channels: tuple[int, int, int, int], name: str, source: str) -> None:
    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        stem, first, second, third = (scaled(count, width) for count in channels)
        return CifarResNet(depth, (stem, first, second, third), num_classes, in_channels)

    blocks = f"{(depth - 2) // 2} residual blocks"
    MODELS.register(name, source=source, candidates=blocks, channels=_listed(channels[1:]))(build)


def _register_wide_resnet(depth: int, widening: int) -> None:
    channels = (16, 16 * widening, 32 * widening, 64 * widening)

    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        stem, first, second, third = (scaled(count, width) for count in channels)
        return WideResNet(depth, (stem, first, second, third), num_classes, in_channels)

    blocks = f"{(depth - 4) // 2} residual blocks"
    name = f"wrn_{depth}_{widening}"
    MODELS.register(name, source=_WIDE_RESNET, candidates=blocks, channels=_listed(channels[1:]))(build)


def _register_vgg(name: str, convolutions: Sequence[int], source: str) -> None:
    """`convolutions`: how many each stage has."""
    channels = (64, 128, 256, 512, 512)

    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        stages = [[scaled(count, width)] * times for count, times in zip(channels, convolutions, strict=True)]
        return Vgg(stages, num_classes, in_channels)

    units = f"{sum(convolutions)} convolution units"
    MODELS.register(name, source=source, candidates=units, channels=_listed(channels))(build)


def _register_cnn32(name: str, channels: tuple[int, int, int], hidden: int) -> None:
    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        first, second, third = (scaled(count, width) for count in channels)
        return Cnn32((first, second, third), scaled(hidden, width), num_classes, in_channels)

    MODELS.register(name, source=_INDISTILL, candidates="3 convolution units", channels=_listed(channels))(build)


def _register_four_stages(name: str, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int]) -> None:
    inner = (64, 128, 256, 512)

    def build(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
        channels = [scaled(count, width) for count in (64, *inner)]
        return FourStageResNet(block, blocks, channels, num_classes, in_channels)

    outputs = _listed([block.expansion * count for count in inner])
    MODELS.register(name, source=_RESNET, candidates=f"{sum(blocks)} residual blocks", channels=outputs)(build)


def _listed(channels: Sequence[int]) -> str:
    return "/".join(str(count) for count in channels)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register_resnet(_depth, (16, 16, 32, 64), f"resnet{_depth}", _RESNET)
for _depth in (8, 32):
    _register_resnet(_depth, (32, 64, 128, 256), f"resnet{_depth}x4", _REPDISTILLER)


_register_four_stages("ResNet18", BasicBlock, (2, 2, 2, 2))
_register_four_stages("ResNet34", BasicBlock, (3, 4, 6, 3))
_register_four_stages("ResNet50", Bottleneck, (3, 4, 6, 3))


for _depth, _widening in ((16, 1), (16, 2), (40, 1), (40, 2)):
    _register_wide_resnet(_depth, _widening)

_register_vgg("vgg8", (1, 1, 1, 1, 1), _REPDISTILLER)
_register_vgg("vgg11", (1, 1, 2, 2, 2), _VGG)
_register_vgg("vgg13", (2, 2, 2, 2, 2), _VGG)
_register_vgg("vgg16", (2, 2, 3, 3, 3), _VGG)
_register_vgg("vgg19", (2, 2, 4, 4, 4), _VGG)


@MODELS.register(
    "MobileNetV2", source=_MOBILENET_V2, candidates="17 inverted residuals", channels="8/12/16/32/48/80/160"
)
def _mobilenet_v2(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
    # Of half the published width, but for the last convolution, which has the published channels.
    return MobileNetV2(0.5 * width, scaled(1280, width), num_classes, in_channels)


@MODELS.register("ShuffleV1", source=_SHUFFLENET_V1, candidates="16 shuffle units", channels="240/480/960")
def _shuffle_v1(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
    return ShuffleNetV1((240, 480, 960), (4, 8, 4), width, num_classes, in_channels)


@MODELS.register("ShuffleV2", source=_SHUFFLENET_V2, candidates="16 shuffle units", channels="116/232/464")
def _shuffle_v2(*, num_classes: int, in_channels: int, width: float) -> nn.Module:
    return ShuffleNetV2((116, 232, 464, 1024), (3, 7, 3), width, num_classes, in_channels)


_register_cnn32("Cnn32", (16, 32, 64), hidden=128)
_register_cnn32("Cnn32_Small", (8, 16, 32), hidden=64)


def check_model_name(name: str) -> None:
    """Raises `InputError` for a name that `build_model` cannot resolve, without running any code of the user's."""
    if is_library_name(name):
        check_library_model(name)
    elif is_own_code(name):
        check_own_code(name, "model")
    else:
        MODELS.entry(name)


def build_model(spec: ModelSpec) -> nn.Module:
    """Builds the network, freshly initialised from torch's global generator.

    Raises:
        InputError: unknown name, a width below 0 or on a network that is not of the zoo, a factory that cannot be
            imported, a network of a library that takes no images of that many channels, timm not installed.
    """
    check_model_name(spec.name)
    if not spec.width > 0:
        raise InputError(f"the width of {spec.name} is {spec.width}, but must be above 0; 1 is the published width")
    if spec.name in MODELS:
        factory = MODELS.get(spec.name)
        return factory(num_classes=spec.num_classes, in_channels=spec.in_channels, width=spec.width)
    if spec.width != 1.0:
        raise InputError(
            f"the width of {spec.name} is {spec.width}, but only networks of the zoo have one; leave it out"
        )
    if is_library_name(spec.name):
        return build_library_model(spec.name, spec.num_classes, spec.in_channels)
    return _built_by_own_code(spec)


def _built_by_own_code(spec: ModelSpec) -> nn.Module:
    try:
        model = load_own_code(spec.name, "model")(num_classes=spec.num_classes, in_channels=spec.in_channels)
    except TypeError as error:
        raise InputError(
            f"{spec.name} cannot be called ({reason(error)}); it must take num_classes and in_channels by name"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec.name} returned a {type(model).__name__}, but must return a torch.nn.Module")
    return model
