import json
from dataclasses import replace

import pytest
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.warmup import Warmup
from hypothesis import given, settings
from hypothesis import strategies as st

HINT = HintPair("layer1.0", "layer1.0", "at", 2.0)
WEIGHTS = st.floats(0, 1e6)
PATHS = st.text("abc.01", min_size=1)
PAIRS = st.builds(HintPair, PATHS, PATHS, st.sampled_from(["at", "sp", "fitnet"]), WEIGHTS)
WARMUPS = st.builds(
    Warmup,
    loss=st.sampled_from(["strongest_channels", "mse"]),
    base_epochs=st.integers(0, 9),
    epochs=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    order=st.sampled_from(["shallow_to_deep", "deep_to_shallow"]),
    lr=st.none() | st.floats(1e-6, 1),
)
DYNAMIC_WEIGHTS = st.builds(
    DynamicWeights,
    hidden=st.integers(1, 200),
    lr=st.floats(1e-6, 1),
    momentum=st.floats(0, 0.99),
    ensemble=st.booleans(),
    meta=st.booleans(),
    meta_every=st.integers(1, 9),
    meta_images=st.integers(64, 2000),
    warmup_fraction=st.floats(0, 0.9),
)
CONFIGURATIONS = st.builds(
    HintConfiguration,
    pairs=st.lists(PAIRS, max_size=4).map(tuple),
    classification_weight=WEIGHTS,
    logit_weight=WEIGHTS,
    logit_loss=st.just("kd"),
    temperature=st.floats(0.5, 20),
    embedding_weight=WEIGHTS,
    embedding_loss=st.sampled_from(["pkt_symmetric", "mse"]),
    normalise=st.booleans(),
    warmup=st.none() | WARMUPS,
    dynamic_weights=st.none() | DYNAMIC_WEIGHTS,
)


@given(CONFIGURATIONS)
@settings(deadline=None)
def test_configuration_survives_the_way_through_json(configuration: HintConfiguration) -> None:
    content = json.loads(json.dumps(configuration.to_dict()))
    assert HintConfiguration.from_dict(content) == configuration


def test_from_dict_leaves_its_argument_as_it_was() -> None:
    content = HintConfiguration(pairs=(HINT,)).to_dict()
    HintConfiguration.from_dict(content)
    assert content == HintConfiguration(pairs=(HINT,)).to_dict()


def test_pairs_of_weight_zero_are_not_active() -> None:
    off = replace(HINT, weight=0.0)
    other = replace(HINT, loss="sp")
    assert HintConfiguration(pairs=(HINT, off, other)).active_pairs == (HINT, other)


@pytest.mark.parametrize(
    ("configuration", "needed"),
    [
        (HintConfiguration(), False),
        (HintConfiguration(pairs=(replace(HINT, weight=0.0),)), False),
        (HintConfiguration(pairs=(HINT,)), True),
        (HintConfiguration(logit_weight=0.5), True),
        (HintConfiguration(embedding_weight=0.5), True),
        (HintConfiguration(pairs=(replace(HINT, weight=0.0),), warmup=Warmup()), True),
        (HintConfiguration(warmup=Warmup()), False),
        (HintConfiguration(dynamic_weights=DynamicWeights()), False),
    ],
)
def test_teacher_is_needed_by_active_terms_only(configuration: HintConfiguration, needed: bool) -> None:
    assert configuration.needs_teacher is needed


def test_configuration_of_a_file_from_before_warmups_has_none() -> None:
    content = HintConfiguration(pairs=(HINT,)).to_dict()
    for later in ("embedding_weight", "embedding_loss", "normalise", "warmup", "dynamic_weights"):
        del content[later]
    assert HintConfiguration.from_dict(content) == HintConfiguration(pairs=(HINT,))
