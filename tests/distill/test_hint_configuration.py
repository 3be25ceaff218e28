import json
from dataclasses import replace

import pytest
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hypothesis import given, settings
from hypothesis import strategies as st

HINT = HintPair("layer1.0", "layer1.0", "at", 2.0)
WEIGHTS = st.floats(0, 1e6)
PATHS = st.text("abc.01", min_size=1)
PAIRS = st.builds(HintPair, PATHS, PATHS, st.sampled_from(["at", "sp", "fitnet"]), WEIGHTS)
CONFIGURATIONS = st.builds(
    HintConfiguration,
    pairs=st.lists(PAIRS, max_size=4).map(tuple),
    classification_weight=WEIGHTS,
    logit_weight=WEIGHTS,
    logit_loss=st.just("kd"),
    temperature=st.floats(0.5, 20),
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
    ],
)
def test_teacher_is_needed_by_active_terms_only(configuration: HintConfiguration, needed: bool) -> None:
    assert configuration.needs_teacher is needed
