"""What the user is told when the input is wrong."""

import difflib
from collections.abc import Iterable

# More names than this are not all told.
MOST_LISTED = 20
LONGEST_REASON = 160


class InputError(ValueError):
    """Bad input: one line that names the value, the rule and the mend. The command line exits with code 2."""


def nearest(value: str, options: Iterable[str]) -> str:
    """The mend for a wrong name: the nearest option, then all of them, or the five nearest if there are many.

    Args:
        value: what was given.
        options: what may be given.

    Returns:
        For example `did you mean 'fitnet'? (at, fitnet, sp)`, or `choose one of at, fitnet, sp`.
    """
    names = sorted(options)
    if not names:
        return "there is nothing to choose from"
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    if len(names) > MOST_LISTED:
        nearby = difflib.get_close_matches(value.lower(), names, n=5, cutoff=0)
        listed = f"{', '.join(sorted(nearby))} and {len(names) - len(nearby)} more"
    return f"did you mean {close[0]!r}? ({listed})" if close else f"choose one of {listed}"


def reason(error: BaseException) -> str:
    """What another library's error says, on one line of at most 160 characters; its type's name if it says nothing."""
    said = " ".join(str(error).split())
    return (said if len(said) <= LONGEST_REASON else f"{said[: LONGEST_REASON - 1]}…") or type(error).__name__
