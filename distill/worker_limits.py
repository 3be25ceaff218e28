"""What several workers cannot train together."""

from ..models.errors import InputError
from .recipe import Recipe


def check_shared_training(workers: int, device: str, recipe: Recipe, unreadable: int = 0, students: int = 1) -> None:
    """Raises `InputError` unless so many workers can train together; one always can.

    Args:
        workers: how many.
        device: that they compute on, `cpu` or `cuda`.
        recipe: of the training.
        unreadable: how many images that cannot be read are tolerated.
        students: trained at once.
    """
    if workers == 1:
        return
    if students > 1:
        raise InputError(f"there are {students} students, but {workers} workers train one; train them separately")
    if recipe.batch_size < 2 * workers:
        raise InputError(
            f"recipe.batch_size is {recipe.batch_size}, but {workers} workers need two images each; raise it to at "
            f"least {2 * workers}"
        )
    if unreadable:
        raise InputError(
            f"data.unreadable is {unreadable}, but of an image that is left out the other workers would not know; mend "
            "the images and set it to 0"
        )
    if recipe.batch_norm == "batch" and device == "cpu":
        raise InputError(
            "recipe.batch_norm is 'batch', whose statistics of all workers torch has on GPUs only; use share or frozen"
        )
