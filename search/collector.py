"""How often Python looks for cycles of objects that nothing else holds."""

import gc

# Of objects made since the last look; mypy's value. Python's own makes imports take a third longer: they make a million
# objects that all stay, and those there are looked through again and again.
WHILE_IMPORTING = 200_000
AS_PYTHON_DOES = gc.get_threshold()


def collect_rarely() -> None:
    """From now on, while a command imports what it needs."""
    gc.set_threshold(WHILE_IMPORTING)


def collect_as_usual() -> None:
    """The imports are over: long work begins."""
    if gc.get_threshold()[0] == WHILE_IMPORTING:
        gc.set_threshold(*AS_PYTHON_DOES)


def keep_what_there_is() -> None:
    """What is there, made by imports mostly, stays and is never looked through again: that takes 0.4 s each time.

    What comes from now on is looked for as usual.
    """
    gc.freeze()
    collect_as_usual()
