"""Reading a study's YAML, by path or by the name of one that ships with hintsearch."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..models.errors import InputError, nearest, reason

# Besides its own errors, the YAML reader lets through those of values it cannot make (a 13th month), and of depth.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def read_study(study: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a study, not yet validated.

    Args:
        study: path of a YAML file, or the name of a study that ships with hintsearch.
        overrides: `KEY=VALUE` with a dotted key and a YAML value, applied in order.

    Raises:
        InputError: no such study, not YAML, or not a mapping.
    """
    text = read_study_text(study)
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except YAML_ERRORS as error:
        raise InputError(f"{study} is not valid YAML ({_yaml_reason(error)}); mend that line") from error
    if not isinstance(content, dict):
        raise InputError(f"{study} holds a {type(content).__name__}, but a study is a mapping of keys; see digits.yaml")
    for override in overrides:
        _override(content, override)
    return content


def study_names() -> tuple[str, ...]:
    """The studies that ship with hintsearch."""
    folder = resources.files("hintsearch.studies")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def read_study_text(study: str) -> str:
    """The text of a study.

    Args:
        study: path of a YAML file, or the name of a study that ships with hintsearch.

    Raises:
        InputError: neither, or not a text file.
    """
    path = Path(study)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise InputError(f"there is no study file {study}; give a file, or one of {', '.join(study_names())}")
        if study not in study_names():
            raise InputError(f"unknown study {study!r}; {nearest(study, study_names())}, or give a YAML file")
        return resources.files("hintsearch.studies").joinpath(f"{study}.yaml").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{study} is not a text file ({error.reason}); give a study in YAML") from error


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override!r} has no '='; write --set KEY=VALUE, as in --set budget.trials=40")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except YAML_ERRORS as error:
        raise InputError(f"--set {key}: {text!r} is not valid YAML ({_yaml_reason(error)}); quote it") from error
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        inner = place.get(parent)
        # A number stands for a fixed range; overriding one of its ends starts a mapping anew.
        place[parent] = dict(inner) if isinstance(inner, dict) else {}
        place = place[parent]
    place[last] = value


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return reason(error)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, which plain YAML answers with the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping after the check."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
