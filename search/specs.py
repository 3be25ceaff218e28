"""How a study's networks are built for its data."""

from dataclasses import replace

from ..distill.data import DataSplits
from ..models.errors import InputError
from ..models.libraries import pretrained_preprocessing
from ..models.preprocessing import Preprocessing
from ..models.zoo import ModelSpec
from .study import Study
from .study_sections import ModelSection
from .study_types import PRETRAINED


def teacher_spec(study: Study, splits: DataSplits) -> ModelSpec:
    """How to build the study's teacher for these data.

    Raises:
        InputError: a preprocessing that does not fit the images' channels.
    """
    return model_spec("teacher", study.teacher, splits.classes, splits.image_shape, splits.preprocessing)


def student_spec(study: Study, splits: DataSplits) -> ModelSpec:
    """How to build the study's student for these data; raises as `teacher_spec` does."""
    return model_spec("student", study.student, splits.classes, splits.image_shape, splits.preprocessing)


def model_spec(
    key: str,
    section: ModelSection,
    classes: int,
    image_shape: tuple[int, int, int],
    normalisation: Preprocessing | None = None,
) -> ModelSpec:
    """How to build a network.

    Args:
        key: of its section, for messages.
        section: of the study.
        classes: outputs.
        image_shape: (channels, height, width) of the data's images.
        normalisation: the data's own; None where the data have not been read and shapes alone matter.

    Raises:
        InputError: a preprocessing that does not fit the images' channels.
    """
    spec = ModelSpec(section.model, classes, image_shape[0], section.width)
    return replace(spec, preprocessing=_preprocessing(key, section, image_shape[0], normalisation))


def _preprocessing(
    key: str, section: ModelSection, channels: int, normalisation: Preprocessing | None
) -> Preprocessing | None:
    """What the network takes, or None: the very images of the data."""
    own = section.preprocessing
    given = own.model_dump(exclude_none=True)
    if not given and section.checkpoint != PRETRAINED:
        return None
    base = normalisation or Preprocessing((0.0,) * channels, (1.0,) * channels)
    if section.checkpoint == PRETRAINED:
        base = pretrained_preprocessing(section.model)
    if isinstance(own.size, int):
        given["size"] = (own.size, own.size)
    made = replace(base, **given)
    for name, values in (("mean", made.mean), ("sd", made.sd)):
        if len(values) != channels:
            raise InputError(
                f"{key}.preprocessing.{name} has {len(values)} values, but the images have {channels} channels; "
                f"give {channels}"
            )
    return made
