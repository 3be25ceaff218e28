import sys
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from hintsearch.models.candidates import list_candidates
from hintsearch.models.errors import InputError
from hintsearch.models.libraries import (
    build_library_model,
    check_library_model,
    is_library_name,
    pretrained_preprocessing,
    pretrained_weights,
)
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.weights import apply_weights
from hintsearch.models.zoo import ModelSpec, build_model
from safetensors.torch import save_file
from torch import Tensor, nn

IMAGENET = {"mean": (0.485, 0.456, 0.406), "sd": (0.229, 0.224, 0.225)}
DENSE_LAYER = "features.denseblock1.denselayer2"
NO_NETWORK = "http://127.0.0.1:9"


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of downloaded weights, and no way to fill it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, NO_NETWORK)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def downloaded(cache: Path, name: str, content: Any) -> None:
    """Puts what torchvision would have downloaded as the default weights into its cache."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(content, cache / url.rpartition("/")[2])


def without_memory(name: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    with torch.device("meta"):
        return build_library_model(name, num_classes, in_channels)


@pytest.mark.parametrize(
    ("name", "library"),
    [("torchvision:resnet18", True), ("timm:nonsense", True), ("resnet8", False), ("a.py:f", False)],
)
def test_library_names_begin_with_the_library(name: str, library: bool) -> None:
    assert is_library_name(name) is library


@pytest.mark.parametrize("name", ["torchvision:resnet34", "timm:resnet18", "timm:resnet18.a1_in1k"])
def test_networks_of_the_libraries_are_known(name: str) -> None:
    check_library_model(name)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("torchvision:resnt34", "did you mean 'torchvision:resnet34'?"),
        ("torchvision:fcn_resnet50", "did you mean 'torchvision:resnet50'?"),
        ("timm:resnt18", "did you mean 'timm:resnet18'?"),
        ("timm:resnet18.tv_in2k", "did you mean 'timm:resnet18.tv_in1k'?"),
        ("timm:hf-hub:someone/something", ""),
    ],
)
def test_unknown_network_is_an_error_with_the_nearest_name(name: str, mend: str) -> None:
    with pytest.raises(InputError) as caught:
        check_library_model(name)
    assert str(caught.value).startswith(f"unknown model {name!r}; {mend}")


def test_timm_that_is_not_installed_is_an_error(without_timm: None) -> None:
    with pytest.raises(InputError) as caught:
        check_library_model("timm:resnet18")
    expected = "timm:resnet18 needs timm, which is not installed; run pip install 'hintsearch[timm]'"
    assert str(caught.value) == expected


def test_torchvision_needs_no_timm(without_timm: None) -> None:
    check_library_model("torchvision:resnet18")


@pytest.mark.parametrize(("name", "rows"), [("torchvision:resnet18", 64), ("timm:test_resnet.r160_in1k", 64)])
def test_networks_of_the_libraries_give_logits(name: str, rows: int) -> None:
    model = build_model(ModelSpec(name, 7, 1)).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, rows, rows)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "first", "settings"),
    [
        ("alexnet", "features.0", (64, (11, 11), (4, 4), (2, 2), True)),
        ("resnet18", "conv1", (64, (7, 7), (2, 2), (3, 3), False)),
        ("vit_b_32", "conv_proj", (768, (32, 32), (32, 32), (0, 0), True)),
    ],
)
def test_first_convolution_takes_other_channels_with_the_same_settings(
    name: str, first: str, settings: tuple[Any, ...]
) -> None:
    made = without_memory(f"torchvision:{name}", in_channels=5).get_submodule(first)
    assert isinstance(made, nn.Conv2d)
    own = (made.out_channels, made.kernel_size, made.stride, made.padding, made.bias is not None)
    assert (made.in_channels, own) == (5, settings)


def test_first_convolution_of_three_channels_starts_as_torchvision_has_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = build_library_model("torchvision:squeezenet1_1", 10, 3).get_parameter("features.0.weight")
        torch.manual_seed(0)
        expected = torchvision.models.squeezenet1_1(num_classes=10).features[0].weight
    assert torch.equal(made, expected)


@pytest.mark.parametrize(("name", "rows"), [("googlenet", 64), ("inception_v3", 96)])
def test_networks_with_auxiliary_heads_have_none_in_training(name: str, rows: int) -> None:
    model = without_memory(f"torchvision:{name}").train()
    logits = model(torch.zeros(2, 3, rows, rows, device="meta"))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 10)
    assert not any(path.lower().startswith("aux") for path in model.state_dict())


def test_width_of_a_network_of_a_library_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^the width of torchvision:resnet18 is 0.5, but only networks of the zoo"):
        build_model(ModelSpec("torchvision:resnet18", 5, 2, width=0.5))


def test_candidates_of_a_network_of_timm() -> None:
    found = list_candidates(without_memory("timm:test_vit"), (3, 160, 160))
    assert [(c.path, c.channels, c.height) for c in found] == [(f"blocks.{i}", 64, 10) for i in range(6)]


def test_candidates_of_timm_s_swin_have_their_channels_second() -> None:
    found = list_candidates(without_memory("timm:swin_tiny_patch4_window7_224"), (3, 224, 224))
    sizes = [(96, 56), (192, 28), (384, 14), (768, 7)]
    assert [(c.channels, c.height) for c in found] == sizes


def test_default_weights_of_torchvision_fit_its_network(torch_cache: Path) -> None:
    published = torchvision.models.squeezenet1_1()
    downloaded(torch_cache, "squeezenet1_1", published.state_dict())
    model = build_library_model("torchvision:squeezenet1_1", 1000, 3)
    apply_weights(model, pretrained_weights("torchvision:squeezenet1_1"), "its weights")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), published.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("densenet121", f"{DENSE_LAYER}.norm.1.bias", f"{DENSE_LAYER}.norm1.bias"),
        (
            "densenet121",
            f"{DENSE_LAYER}.conv.2.weight",
            f"{DENSE_LAYER}.conv2.weight",
        ),
        ("densenet121", "features.transition1.norm.weight", "features.transition1.norm.weight"),
        ("googlenet", "aux1.fc1.weight", None),
        ("inception_v3", "AuxLogits.fc.weight", None),
    ],
)
def test_names_of_published_weights_become_those_of_the_network(
    torch_cache: Path, name: str, published: str, expected: str | None
) -> None:
    downloaded(torch_cache, name, {published: torch.zeros(2)})
    state = pretrained_weights(f"torchvision:{name}")
    assert list(state) == ([expected] if expected else [])
    assert expected is None or expected in without_memory(f"torchvision:{name}").state_dict()


def test_published_weights_cannot_run_code(torch_cache: Path) -> None:
    downloaded(torch_cache, "resnet18", {"conv1.weight": Path("anything but a tensor")})
    with pytest.raises(InputError, match=r"^the weights of torchvision:resnet18 cannot be loaded \(Weights only"):
        pretrained_weights("torchvision:resnet18")


def test_weights_of_torchvision_without_a_network_are_an_error(
    torch_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody listens there, whatever network the machine has.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    # What an earlier call made has the proxies of that time.
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(InputError) as caught:
        pretrained_weights("torchvision:resnet18")
    assert str(caught.value) == (
        "the weights of torchvision:resnet18 cannot be loaded (<urlopen error [Errno 111] Connection refused>); "
        "connect to the network, or give the path of a weights file"
    )


def test_weights_of_timm_without_a_network_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^the weights of timm:test_resnet cannot be loaded \(.+\); connect to"):
        pretrained_weights("timm:test_resnet")


def test_weights_of_timm_fit_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_resnet").state_dict()
    save_file(published, tmp_path / "published.safetensors")
    settings = timm.models._registry._model_pretrained_cfgs["test_resnet.r160_in1k"]
    monkeypatch.setattr(settings, "file", str(tmp_path / "published.safetensors"))
    state = pretrained_weights("timm:test_resnet.r160_in1k")
    apply_weights(build_library_model("timm:test_resnet", 1000, 3), state, "its weights")
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items())


@pytest.mark.parametrize("name", ["resnet8", "my_nets.py:build"])
@pytest.mark.parametrize("ask", [pretrained_weights, pretrained_preprocessing])
def test_networks_of_no_library_have_no_weights(name: str, ask: Any) -> None:
    with pytest.raises(InputError) as caught:
        ask(name)
    assert str(caught.value) == (
        f"{name} comes without weights, only networks of torchvision and timm have any; give the path of a weights file"
    )


def test_network_of_timm_without_weights_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^timm has no weights for vit_small_patch16_36x1_224; give the path"):
        pretrained_weights("timm:vit_small_patch16_36x1_224")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision:resnet34", Preprocessing(**IMAGENET, size=(224, 224))),
        ("torchvision:swin_v2_t", Preprocessing(**IMAGENET, size=(256, 256), interpolation="bicubic")),
        # The weights for images of 224 rows, for which the network is built; the default ones are for 518.
        ("torchvision:vit_h_14", Preprocessing(**IMAGENET, size=(224, 224), interpolation="bicubic")),
        # With its own weights torchvision changes the usual normalisation into this one in the network.
        ("torchvision:inception_v3", Preprocessing((0.5,) * 3, (0.5,) * 3, (299, 299))),
        ("timm:test_resnet.r160_in1k", Preprocessing((0.5,) * 3, (0.5,) * 3, (160, 160))),
        ("timm:resnet18.a1_in1k", Preprocessing(**IMAGENET, size=(224, 224), interpolation="bicubic")),
    ],
)
def test_preprocessing_is_that_of_the_weights(name: str, expected: Preprocessing) -> None:
    assert pretrained_preprocessing(name) == expected


def test_images_normalised_for_inception_are_what_torchvision_makes_of_the_usual_normalisation() -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    usual, own = (
        (pixels - m.view(3, 1, 1)) / s.view(3, 1, 1)
        for m, s in (
            (torch.tensor(IMAGENET["mean"]), torch.tensor(IMAGENET["sd"])),
            (torch.full((3,), 0.5), torch.full((3,), 0.5)),
        )
    )
    with torch.device("meta"):
        network = torchvision.models.googlenet(transform_input=True, init_weights=False)
    torch.testing.assert_close(network._transform_input(usual), own)
