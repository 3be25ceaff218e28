"""How a study's networks are built for its data, and in which precision they compute."""

from typing import Any

import pytest
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.models.errors import InputError
from hintsearch.models.libraries import pretrained_preprocessing
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.search.hardware import local_execution, trial_execution
from hintsearch.search.layers import candidates_of
from hintsearch.search.ray_session import living_nodes
from hintsearch.search.specs import model_spec
from hintsearch.search.study_sections import ModelSection, ResourcesSection

DATA = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
IMAGE = (3, 32, 32)


def section(**keys: Any) -> ModelSection:
    return ModelSection.model_validate({"model": "resnet8", **keys})


def test_network_that_says_nothing_takes_the_images_of_the_data() -> None:
    assert model_spec("student", section(), 10, IMAGE, DATA).preprocessing is None


def test_what_a_study_does_not_say_is_as_the_data_have_it() -> None:
    spec = model_spec("student", section(preprocessing={"size": 16, "interpolation": "bicubic"}), 10, IMAGE, DATA)
    assert spec.preprocessing == Preprocessing(DATA.mean, DATA.sd, (16, 16), "bicubic")


def test_height_and_width_may_differ() -> None:
    spec = model_spec("student", section(preprocessing={"size": [16, 24]}), 10, IMAGE, DATA)
    assert spec.input_shape(IMAGE) == (3, 16, 24)


def test_pretrained_weights_bring_their_own_preprocessing() -> None:
    spec = model_spec("teacher", section(model="torchvision:resnet18", checkpoint="pretrained"), 1000, IMAGE, DATA)
    assert spec.preprocessing == pretrained_preprocessing("torchvision:resnet18")
    assert spec.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))


def test_study_overrides_the_preprocessing_of_pretrained_weights() -> None:
    given = section(model="torchvision:resnet18", checkpoint="pretrained", preprocessing={"size": 96})
    spec = model_spec("teacher", given, 1000, IMAGE, DATA)
    assert spec.preprocessing is not None
    assert (spec.preprocessing.size, spec.preprocessing.mean) == ((96, 96), pytest.approx((0.485, 0.456, 0.406)))


def test_preprocessing_of_another_number_of_channels_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        model_spec("teacher", section(preprocessing={"mean": [0.5]}), 10, IMAGE, DATA)
    assert str(caught.value) == "teacher.preprocessing.mean has 1 values, but the images have 3 channels; give 3"


def test_pretrained_weights_of_a_network_that_has_none_are_refused() -> None:
    with pytest.raises(InputError, match="resnet8"):
        model_spec("teacher", section(checkpoint="pretrained"), 10, IMAGE, DATA)


def test_candidates_have_the_size_that_the_network_takes() -> None:
    spec = model_spec("student", section(preprocessing={"size": 16}), 10, IMAGE, DATA)
    assert [candidate.height for candidate in candidates_of(spec, IMAGE)] == [16, 8, 4]


def test_automatic_precision_is_the_fastest_that_the_hardware_has() -> None:
    execution, why = local_execution(ResourcesSection(), on_gpu=False)
    assert (execution.precision, why) == best_precision("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_of_the_study_is_kept(precision: str) -> None:
    resources = ResourcesSection.model_validate({"precision": precision, "compile": "default"})
    assert local_execution(resources, on_gpu=False)[0] == Execution("cpu", precision, "default")


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("others", [[], [{"NodeID": "another", "Alive": True, "Resources": {"CPU": 1.0}}]])
def test_a_worker_is_asked_for_the_precision_only_if_it_may_be_on_another_machine(
    others: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, nodes = local_execution(ResourcesSection(), on_gpu=False), [*living_nodes(), *others]
    monkeypatch.setattr("hintsearch.search.hardware.living_nodes", lambda: nodes)
    # A worker knows nothing of it.
    monkeypatch.setattr("hintsearch.search.hardware.best_precision", lambda _device: ("fp32", "as this process says"))
    ours = Execution("cpu", "fp32"), "as this process says"
    assert trial_execution(ResourcesSection()) == (theirs if others else ours)
