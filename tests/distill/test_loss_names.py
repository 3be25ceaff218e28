"""Losses by their names: ours, somebody's own, several at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hintsearch.distill.data import DataSplits
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.logit_losses import kd
from hintsearch.distill.loss_names import (
    check_hint_losses,
    check_logit_loss,
    find_hint_loss,
    find_logit_loss,
    is_joint,
    names_together,
)
from hintsearch.distill.losses import HINT_LOSSES, LOGIT_LOSSES, FeatureShape, HintLoss
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.models.errors import InputError
from small_training import PAIRS, RECIPE, STUDENT, figures
from torch import nn

OWN_LOSSES = """
import torch
from torch import nn
from torch.nn import functional

from hintsearch.distill.losses import HintLoss


def means(student, teacher):
    return (student.mean((1, 2, 3)) - teacher.mean((1, 2, 3))).square()


def mean(student, teacher):
    return means(student, teacher).mean()


def own_kd(student, teacher, labels, temperature):
    ours, theirs = (logits.div(temperature).log_softmax(dim=1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


class Projected(HintLoss):
    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.project = nn.Linear(student.channels, teacher.channels)

    def adapt(self, student, teacher):
        return self.project(student.mean((2, 3))), teacher.mean((2, 3))

    def compare(self, student, teacher):
        return (student - teacher).square().mean(dim=1)


class NoLoss(nn.Module):
    pass


def wide(student, *others):
    return torch.zeros(len(student), 2)


def short(student, *others):
    return torch.zeros(len(student) + 1)


def number(*others):
    return 0.5


def nothing(*others):
    pass


value = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """The path of a file with one's own losses."""
    path = tmp_path / "my_losses.py"
    path.write_text(OWN_LOSSES)
    return str(path)


def train(splits: DataSplits, teacher: nn.Module, hints: HintConfiguration, epochs: int = 1) -> Trainer:
    return Trainer(STUDENT, splits, RECIPE, (epochs,), Seeds(1, 2), hints=hints, teacher=TeacherNetwork(teacher))


def one_pair(loss: str) -> HintConfiguration:
    return HintConfiguration((HintPair("layer3.0", "layer3.0", loss, 1.0),), classification_weight=0.0)


def said(error: pytest.ExceptionInfo[InputError]) -> str:
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "separate"), [("at", ("at",)), ("at+crd", ("at", "crd")), ("a+b+c", ("a", "b", "c"))]
)
def test_names_together_are_separated(names: str, separate: tuple[str, ...]) -> None:
    assert names_together(names) == separate


@pytest.mark.parametrize("names", ["at", "at+crd", "at+fsp+crd", *HINT_LOSSES.names()])
def test_hint_losses_alone_and_together_pass(names: str) -> None:
    check_hint_losses(names)
    assert [find_hint_loss(name) for name in names_together(names)] == [
        HINT_LOSSES.get(name) for name in names.split("+")
    ]


@pytest.mark.parametrize("name", LOGIT_LOSSES.names())
def test_logit_losses_pass(name: str) -> None:
    check_logit_loss(name)
    assert find_logit_loss(name) is LOGIT_LOSSES.get(name)


@pytest.mark.parametrize("names", ["at+at", "at+crd+at"])
def test_name_that_stands_twice_is_refused(names: str) -> None:
    with pytest.raises(InputError) as caught:
        check_hint_losses(names)
    assert said(caught) == f"{names!r} has 'at' twice, but each may stand once; remove one"


@pytest.mark.parametrize("names", ["fitnt", "at+fitnt", "fitnt+at"])
def test_unknown_hint_loss_is_an_error_with_the_nearest_name(names: str) -> None:
    with pytest.raises(InputError) as caught:
        check_hint_losses(names)
    assert said(caught).startswith("unknown hint loss 'fitnt'; did you mean 'fitnet'?")


def test_nothing_between_two_names_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown hint loss ''"):
        check_hint_losses("at+")


def test_unknown_logit_loss_is_an_error_with_the_names() -> None:
    with pytest.raises(InputError, match="unknown logit loss 'kdd'; did you mean 'kd'"):
        check_logit_loss("kdd")


def test_joint_losses_are_known_without_running_code(own: str) -> None:
    assert [name for name in HINT_LOSSES.names() if is_joint(name)] == ["fsp", "reviewkd"]
    assert not is_joint(f"{own}:means")
    assert not is_joint("no such loss")


def test_check_of_own_code_does_not_run_it(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    ran = tmp_path / "ran"
    path.write_text(f"open({str(ran)!r}, 'w').close()")
    check_hint_losses(f"at+{path}:loss")
    check_logit_loss(f"{path}:loss")
    assert not ran.exists()
    # It is what running would leave.
    with pytest.raises(InputError, match="has no function 'loss'"):
        find_hint_loss(f"{path}:loss")
    assert ran.exists()


@pytest.mark.parametrize(
    ("place", "rest"),
    [
        ("{folder}/none.py:loss", "there is no file {folder}/none.py; give a path from the folder you are in"),
        ("no_such_module:loss", "there is no module no_such_module; install it, or give path/to/file.py:function"),
        ("{folder}/none.py:1", "'1' is not a function's name; write path/to/file.py:function"),
    ],
)
def test_own_code_that_is_not_there_is_an_error(tmp_path: Path, place: str, rest: str) -> None:
    name = place.format(folder=tmp_path)
    for kind, check in (("hint loss", check_hint_losses), ("logit loss", check_logit_loss)):
        with pytest.raises(InputError) as caught:
            check(name)
        assert said(caught) == f"{kind} {name!r}: {rest.format(folder=tmp_path)}"


def test_function_that_a_file_does_not_have_is_an_error_with_the_nearest(own: str) -> None:
    with pytest.raises(InputError) as hint:
        find_hint_loss(f"{own}:meanz")
    with pytest.raises(InputError) as logit:
        find_logit_loss(f"{own}:own_kt")
    assert said(hint).startswith(f"hint loss '{own}:meanz': {own} has no function 'meanz'; did you mean 'mean")
    assert said(logit).startswith(f"logit loss '{own}:own_kt': {own} has no function 'own_kt'; did you mean 'own_kd'")


def test_what_is_no_function_is_an_error(own: str) -> None:
    with pytest.raises(InputError, match="has no function 'value'"):
        find_hint_loss(f"{own}:value")


def test_class_that_is_no_hint_loss_is_refused(own: str) -> None:
    with pytest.raises(InputError) as caught:
        find_hint_loss(f"{own}:NoLoss")
    assert said(caught) == (
        f"hint loss '{own}:NoLoss' is a class that is no HintLoss; derive it from hintsearch.distill.losses.HintLoss, "
        "or give a function of the student's and the teacher's features"
    )


def test_own_function_is_a_hint_loss_without_adapters_that_may_draw(own: str) -> None:
    kind = find_hint_loss(f"{own}:means")
    assert issubclass(kind, HintLoss)
    loss = kind(FeatureShape(2, 4, 4), FeatureShape(3, 2, 2))
    assert list(loss.parameters()) == []
    assert loss.draws
    student, teacher = torch.randn(5, 2, 4, 4), torch.randn(5, 3, 2, 2)
    expected = (student.mean((1, 2, 3)) - teacher.mean((1, 2, 3))).square()
    torch.testing.assert_close(loss.compare(student, teacher), expected)


def test_own_logit_loss_that_is_kd_is_kd(own: str) -> None:
    student, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    found = find_logit_loss(f"{own}:own_kd")(student, teacher, labels, 4.0)
    torch.testing.assert_close(found, kd(student, teacher, labels, 4.0))


@pytest.mark.parametrize("loss", ["means", "mean", "Projected"])
def test_student_is_trained_by_an_own_hint_loss(splits: DataSplits, teacher: nn.Module, own: str, loss: str) -> None:
    trainer = train(splits, teacher, one_pair(f"{own}:{loss}"), epochs=3)
    found = [result.metrics["loss_hint"] for result in trainer.epochs()]
    assert found[-1] < 0.8 * found[0]


def test_adapter_of_an_own_class_is_trained(splits: DataSplits, teacher: nn.Module, own: str) -> None:
    trainer = train(splits, teacher, one_pair(f"{own}:Projected"))
    (training,) = trainer._group._trainings
    adapter = training.whole.get_parameter("_terms.0.loss.project.weight")
    before = adapter.detach().clone()
    assert before.shape == (32, 16)
    list(trainer.epochs())
    assert not torch.equal(adapter, before)


def test_student_is_trained_by_an_own_logit_loss_as_by_ours(splits: DataSplits, teacher: nn.Module, own: str) -> None:
    hints = HintConfiguration(PAIRS, logit_weight=0.5)
    ours, theirs = (
        figures(train(splits, teacher, replace(hints, logit_loss=loss)).epochs())[0] for loss in ("kd", f"{own}:own_kd")
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "found"),
    [("wide", "a tensor [16, 2]"), ("short", "a tensor [17]"), ("number", "a float"), ("nothing", "a NoneType")],
)
@pytest.mark.parametrize("kind", ["hint loss", "logit loss"])
@pytest.mark.parametrize("normalise", [True, False])
def test_own_function_that_gives_no_loss_is_an_error_in_the_first_step(
    splits: DataSplits, teacher: nn.Module, own: str, kind: str, loss: str, found: str, normalise: bool
) -> None:
    name = f"{own}:{loss}"
    hints = one_pair(name) if kind == "hint loss" else HintConfiguration(PAIRS, logit_weight=1.0, logit_loss=name)
    with pytest.raises(InputError) as caught:
        next(train(splits, teacher, replace(hints, normalise=normalise)).epochs())
    assert said(caught) == (f"{kind} {name!r} gives {found}, but must give a tensor [16], of each image, or a scalar")
