"""Studies that weigh a cost against their objective, or search the student's width."""

from collections.abc import Callable

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.study import Study, validate_study

Studied = Callable[..., Study]
WIDTHS = "space.student_width=[0.25, 0.5]"


def refusal(studied: Studied, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        studied(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective.against=student_parameters"],
            "objective.against is student_parameters, but all students are of one size; give several in "
            "space.student_width",
        ),
        (
            [WIDTHS, "student={model: resnet8, checkpoint: start.safetensors}"],
            "space.student_width has several students, but student.checkpoint has the weights of one; remove one",
        ),
        (
            [WIDTHS, "space.hints.pairings=[by_depth, by_similarity]"],
            "space.hints.pairings has 'by_similarity', which measures one student, but space.student_width has "
            "several; remove one",
        ),
        (["objective.against=training_second"], "unknown cost 'training_second'; did you mean 'training_seconds'?"),
        (["space.student_width=[0.5, 0.5]"], "0.5 is listed twice, but each may stand once; remove one"),
        (["space.student_width=[0.5, 0]"], "space.student_width.1 is 0, but input should be greater than 0"),
    ],
)
def test_mistake_is_one_clear_line(studied: Studied, overrides: list[str], message: str) -> None:
    assert message in refusal(studied, *overrides)


@pytest.mark.parametrize(
    "overrides", [["objective.against=training_seconds"], ["objective.against=student_parameters", WIDTHS], [WIDTHS]]
)
def test_resolved_study_is_the_same_study(studied: Studied, overrides: list[str]) -> None:
    study = studied(*overrides)
    assert validate_study(study.resolved(), "resolved") == study


def test_no_cost_is_weighed_unless_the_study_says_so(digits: Study) -> None:
    assert (digits.objective.against, digits.space.student_width) == (None, ())
