"""From the names in a study to losses: ours, somebody's own, and several at once."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from ..models.errors import InputError
from ..models.own_code import check_own_code, is_own_code, load_own_code
from .logit_losses import COUPLED_LOGIT_LOSSES
from .losses import HINT_LOSSES, LOGIT_LOSSES, FeatureShape, HintLoss, JointHintLoss, LogitLoss

# Between the hint losses that each pair has at once.
TOGETHER = "+"
HINT_LOSS, LOGIT_LOSS = "hint loss", "logit loss"


def names_together(names: str) -> tuple[str, ...]:
    """The names in `at+crd`, or the one that it is."""
    return tuple(names.split(TOGETHER))


def check_hint_losses(names: str) -> None:
    """Raises `InputError` unless the name, or each of several with `+` between them, is a hint loss; runs no code."""
    separate = names_together(names)
    for name in separate:
        if separate.count(name) > 1:
            raise InputError(f"{names!r} has {name!r} twice, but each may stand once; remove one")
        if is_own_code(name):
            check_own_code(name, HINT_LOSS)
        else:
            HINT_LOSSES.entry(name)


def check_logit_loss(name: str) -> None:
    """Raises `InputError` unless it is a logit loss; runs no code."""
    if is_own_code(name):
        check_own_code(name, LOGIT_LOSS)
    else:
        LOGIT_LOSSES.entry(name)


def is_joint(name: str) -> bool:
    """Whether it is one of our hint losses of all pairs together; of somebody's own nothing is known before it runs."""
    return name in HINT_LOSSES and issubclass(HINT_LOSSES.get(name), JointHintLoss)


def find_hint_loss(name: str) -> type[HintLoss] | type[JointHintLoss]:
    """The hint loss of that name; somebody's own function becomes one without adapters.

    Raises:
        InputError: no such loss; own code that cannot be loaded, or is a class of another kind.
    """
    if not is_own_code(name):
        return HINT_LOSSES.get(name)
    found = load_own_code(name, HINT_LOSS)
    if not isinstance(found, type):
        return _of_function(name, found)
    if not issubclass(found, HintLoss | JointHintLoss):
        raise InputError(
            f"{HINT_LOSS} {name!r} is a class that is no HintLoss; derive it from hintsearch.distill.losses.HintLoss, "
            "or give a function of the student's and the teacher's features"
        )
    return found


def find_logit_loss(name: str) -> LogitLoss:
    """The logit loss of that name.

    Raises:
        InputError: no such loss; own code that cannot be loaded.
    """
    if not is_own_code(name):
        return LOGIT_LOSSES.get(name)
    own = load_own_code(name, LOGIT_LOSS)

    def checked(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return checked_loss(own(student, teacher, labels, temperature), len(student), f"{LOGIT_LOSS} {name!r}")

    return checked


def logit_loss_couples(name: str) -> bool:
    """Whether the loss of an image depends on the other images of its batch; of somebody's own nobody knows."""
    return is_own_code(name) or name in COUPLED_LOGIT_LOSSES


def _of_function(name: str, function: Callable[..., Any]) -> type[HintLoss]:
    """A hint loss that calls a function (student [B, C_S, H_S, W_S], teacher [B, C_T, H_T, W_T]) → [B] or scalar."""

    class OfFunction(HintLoss):
        # Nobody knows, so it is trained alone, and always sees a whole batch.
        draws = couples = True

        def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
            super().__init__(student, teacher)

        def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
            return cast(Tensor, function(student, teacher))

    return OfFunction


def checked_loss(value: Any, images: int, what: str) -> Tensor:
    """The value, if it is a loss of each of the images [B], or a scalar.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, Tensor) or value.shape not in ((), (images,)):
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"{what} gives {found}, but must give a tensor [{images}], of each image, or a scalar")
    return value
