"""In which precision a search computes: that of the hardware that its trials get."""

from typing import Any

import ray

from ..distill.execution import Execution, best_precision
from .ray_session import is_here_alone, living_nodes
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
    """Where and how the trials of a search compute, and why: one answer for all, so that they can be compared.

    A worker is asked where its machine or its GPU decides and may be another than this process's: it takes some
    seconds to start. Ray must be running.
    """
    on_gpu = resources.on_gpu
    if resources.precision != AUTO_PRECISION or (not on_gpu and _trials_run_here(resources)):
        return local_execution(resources, on_gpu)
    remote: Any = ray.remote(local_execution).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker
    )
    found: tuple[Execution, str] = ray.get(remote.remote(resources, on_gpu))
    return found


def _trials_run_here(resources: ResourcesSection) -> bool:
    """Whether this machine is the whole cluster: one without the CPUs for a trial waits for others."""
    nodes = living_nodes()
    return is_here_alone(nodes) and nodes[0]["Resources"].get("CPU", 0) >= resources.cpus_per_worker
