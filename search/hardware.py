"""In which precision a search computes: that of the hardware that its trials get."""

from typing import Any

import ray

from ..distill.execution import Execution, best_precision
from .study_sections import ResourcesSection
from .study_types import AUTO_PRECISION


def local_execution(resources: ResourcesSection, on_gpu: bool) -> tuple[Execution, str]:
    """Where and how a training of this process computes, and why in this precision.

    Args:
        resources: of a study.
        on_gpu: whether it has a GPU.
    """
    device = "cuda" if on_gpu else "cpu"
    precision, why = resources.precision, "as the study says"
    if precision == AUTO_PRECISION:
        precision, why = best_precision(device)
    return Execution(device, precision, resources.compile), why


def trial_execution(resources: ResourcesSection) -> tuple[Execution, str]:
    """Where and how the trials of a search compute, and why: asked of a worker, for the driver may be another machine.

    One answer for all trials, so that they can be compared. Ray must be running.
    """
    remote: Any = ray.remote(local_execution).options(
        num_cpus=resources.cpus_per_trial, num_gpus=resources.gpus_per_trial
    )
    found: tuple[Execution, str] = ray.get(remote.remote(resources, resources.gpus_per_trial > 0))
    return found
