from pathlib import Path

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import (
    MODELS,
    ModelSpec,
    build_model,
    check_model_name,
    is_own_factory,
    own_factory_sha256,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def block_names(stage: int, block: int, downsample: bool) -> set[str]:
    prefix = f"layer{stage}.{block}"
    convolutions = [f"{prefix}.conv1", f"{prefix}.conv2"] + [f"{prefix}.downsample.0"] * downsample
    norms = [f"{prefix}.bn1", f"{prefix}.bn2"] + [f"{prefix}.downsample.1"] * downsample
    return {f"{convolution}.weight" for convolution in convolutions}.union(*(norm_names(norm) for norm in norms))


def norm_names(norm: str) -> set[str]:
    return {f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def repdistiller_names(blocks: int, wide: bool) -> set[str]:
    """The names in a public RepDistiller checkpoint; the x4 networks widen in stage 1 too."""
    names = {"conv1.weight", "fc.weight", "fc.bias"} | norm_names("bn1")
    for stage in (1, 2, 3):
        for block in range(blocks):
            names |= block_names(stage, block, downsample=block == 0 and (stage > 1 or wide))
    return names


@pytest.mark.parametrize("name", MODELS.names())
@given(
    in_channels=st.integers(1, 4),
    num_classes=st.integers(1, 30),
    width=st.floats(0.01, 0.6),
    size=st.integers(5, 12),
    batch=st.integers(1, 3),
)
@settings(deadline=None, max_examples=4)
def test_every_network_gives_logits(
    name: str, in_channels: int, num_classes: int, width: float, size: int, batch: int
) -> None:
    model = build_model(ModelSpec(name, num_classes, in_channels, width)).eval()
    with torch.no_grad():
        assert model(torch.zeros(batch, in_channels, size, size)).shape == (batch, num_classes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.278), ("resnet56", 0.862), ("resnet110", 1.737), ("resnet8x4", 1.234), ("resnet32x4", 7.434)],
)
def test_parameter_count_is_the_published_one(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec(name, 100, 3))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_width_scales_every_inner_channel_count() -> None:
    model = build_model(ModelSpec("resnet8", 10, 3, width=0.5))
    shapes = {name: tuple(weight.shape[:2]) for name, weight in model.state_dict().items() if weight.dim() == 4}
    assert shapes["conv1.weight"] == (8, 3)
    assert shapes["layer1.0.conv2.weight"] == (8, 8)
    assert shapes["layer2.0.conv1.weight"] == (16, 8)
    assert shapes["layer3.0.downsample.0.weight"] == (32, 16)


@pytest.mark.parametrize(
    ("name", "blocks", "wide"), [("resnet8", 1, False), ("resnet20", 3, False), ("resnet32x4", 5, True)]
)
def test_state_dict_has_the_names_of_public_checkpoints(name: str, blocks: int, wide: bool) -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec(name, 100, 3))
    assert set(model.state_dict()) == repdistiller_names(blocks, wide)


def test_initial_weights_follow_the_global_generator() -> None:
    hashes = []
    with torch.random.fork_rng():
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            hashes.append(weights_sha256(build_model(ModelSpec("resnet8", 10, 1)).state_dict()))
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_spec_survives_the_way_to_plain_types_and_back() -> None:
    spec = ModelSpec("resnet8", 7, 2, 0.5)
    assert ModelSpec(**spec.to_dict()) == spec


def test_unknown_network_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"^unknown model 'resnt20'; did you mean 'resnet20'\? \(resnet110, .*\)$"):
        build_model(ModelSpec("resnt20", 10, 3))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_width_that_is_not_above_zero_is_an_error(width: float) -> None:
    with pytest.raises(InputError) as caught:
        build_model(ModelSpec("resnet8", 10, 3, width))
    expected = f"the width of resnet8 is {width}, but must be above 0; 1 is the published width"
    assert str(caught.value) == expected


def test_own_factory_is_found_by_file(own_factory: Path) -> None:
    model = build_model(ModelSpec(f"{own_factory}:build_net", 5, 2))
    assert model(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def test_own_factory_is_found_by_module(own_module: str) -> None:
    model = build_model(ModelSpec(f"{own_module}:build_net", 5, 2))
    assert model(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def test_changed_own_file_is_read_anew(own_factory: Path) -> None:
    build_model(ModelSpec(f"{own_factory}:build_net", 5, 2))
    own_factory.write_text(own_factory.read_text().replace("build_net", "build_other_net"))
    model = build_model(ModelSpec(f"{own_factory}:build_other_net", 5, 2))
    assert model(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def test_own_file_may_define_a_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "with_settings.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom torch import nn\n\n"
        "@dataclass\nclass Settings:\n    size: int\n\n"
        "def build(*, num_classes, in_channels):\n    return nn.Linear(Settings(4).size, num_classes)\n"
    )
    assert build_model(ModelSpec(f"{path}:build", 5, 2))(torch.zeros(3, 4)).shape == (3, 5)


def test_wrong_function_in_own_file_is_an_error_with_the_nearest_function(own_factory: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_model(ModelSpec(f"{own_factory}:biuld_net", 5, 2))
    assert str(caught.value) == (
        f"model '{own_factory}:biuld_net': {own_factory} has no function 'biuld_net'; "
        "did you mean 'build_net'? (build_net, build_nothing)"
    )


def test_wrong_function_in_own_module_is_an_error_with_the_nearest_function(own_module: str) -> None:
    with pytest.raises(InputError, match=f"{own_module} has no function 'build_nte'; did you mean 'build_net'"):
        build_model(ModelSpec(f"{own_module}:build_nte", 5, 2))


def test_missing_own_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "absent.py"
    with pytest.raises(InputError) as caught:
        build_model(ModelSpec(f"{path}:build_net", 5, 2))
    expected = f"model '{path}:build_net': there is no file {path}; give a path from the folder you are in"
    assert str(caught.value) == expected


def test_missing_own_module_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        build_model(ModelSpec("no_such_module_anywhere:build_net", 5, 2))
    assert str(caught.value) == (
        "model 'no_such_module_anywhere:build_net': No module named 'no_such_module_anywhere'; "
        "install the module or give path/to/file.py:function"
    )


@pytest.mark.parametrize("name", [":build", ".nets:build", "my..nets:build"])
def test_broken_module_name_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"is not a module's name; write package.module:function$"):
        build_model(ModelSpec(name, 5, 2))


def test_function_that_is_no_identifier_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r"'build net' is not a function's name; write path/to/file.py:function$"):
        build_model(ModelSpec(f"{own_factory}:build net", 5, 2))


def test_factory_that_returns_no_network_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r":build_nothing returned a dict, but must return a torch.nn.Module$"):
        build_model(ModelSpec(f"{own_factory}:build_nothing", 5, 2))


def test_width_of_an_own_factory_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r"is 0.5, but only networks of the zoo have one; leave it out$"):
        build_model(ModelSpec(f"{own_factory}:build_net", 5, 2, width=0.5))


def test_checking_a_name_runs_no_code_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "loud.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef build(**_): ...\n")
    check_model_name(f"{path}:build")
    assert not (tmp_path / "ran").exists()


def test_checking_a_name_refuses_an_unknown_network() -> None:
    with pytest.raises(InputError, match="unknown model 'resnet9'"):
        check_model_name("resnet9")


@pytest.mark.parametrize(("name", "own"), [("resnet8", False), ("nets.py:build", True), ("pack.nets:build", True)])
def test_a_colon_marks_an_own_factory(name: str, own: bool) -> None:
    assert is_own_factory(name) is own


def test_hash_of_an_own_file_follows_its_content(own_factory: Path) -> None:
    before = own_factory_sha256(f"{own_factory}:build_net")
    own_factory.write_text(own_factory.read_text() + "\n# changed\n")
    assert own_factory_sha256(f"{own_factory}:build_net") != before


@pytest.mark.parametrize("name", ["resnet8", "pack.nets:build"])
def test_only_an_own_file_has_a_hash(name: str) -> None:
    assert own_factory_sha256(name) is None
