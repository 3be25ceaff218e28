"""What a study says of the resources of a trial."""

from collections.abc import Callable

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.node_checks import check_one_trial_fits
from hintsearch.search.study import Study, validate_study

Studied = Callable[..., Study]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resources.gpus_per_trial=1.5"], "gpus_per_trial is 1.5, but a trial has a share of one GPU or whole ones"),
        (
            ["resources={gpus_per_trial: 4, workers_per_trial: 2}"],
            "workers_per_trial is 2, but each worker has one of the 4 GPUs; leave it out",
        ),
        (
            ["resources={gpus_per_trial: 0.5, workers_per_trial: 2}"],
            "workers_per_trial is 2, but each worker has one of the 0.5 GPUs; leave it out",
        ),
        (["resources.device=cuda"], "device is cuda, but gpus_per_trial is 0; set it to what a trial may use"),
        (["resources.device=gpu"], "unknown device 'gpu'; "),
        (["recipe.batch_norm=synchronised"], "unknown statistics of batch norm 'synchronised'; "),
        (
            ["resources.workers_per_trial=2", "recipe.batch_norm=batch"],
            "recipe.batch_norm is 'batch', whose statistics of all workers torch has on GPUs only; use share or frozen",
        ),
        (
            ["resources.gpus_per_trial=4", "recipe.batch_size=7"],
            "recipe.batch_size is 7, but 4 workers need two images each; raise it to at least 8",
        ),
        (
            ["resources.gpus_per_trial=4", "data.unreadable=3"],
            "data.unreadable is 3, but of an image that is left out the other workers would not know",
        ),
    ],
)
def test_mistake_is_one_clear_line(studied: Studied, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        studied(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "workers", "cpus", "gpus", "on_gpu"),
    [
        ("{}", 1, 1, 0, False),
        ("{cpus_per_trial: 4}", 1, 4, 0, False),
        ("{gpus_per_trial: 0.5, cpus_per_trial: 2}", 1, 2, 0.5, True),
        ("{gpus_per_trial: 1}", 1, 1, 1, True),
        ("{gpus_per_trial: 4, cpus_per_trial: 32}", 4, 8, 1, True),
        ("{gpus_per_trial: 4}", 4, 1, 1, True),
        ("{workers_per_trial: 2, cpus_per_trial: 2}", 2, 1, 0, False),
        ("{gpus_per_trial: 2, device: cpu}", 2, 1, 1, False),
    ],
)
def test_each_worker_has_its_part(
    studied: Studied, section: str, workers: int, cpus: int, gpus: float, on_gpu: bool
) -> None:
    study = studied(f"resources={section}")
    found = study.resources
    assert (found.workers, found.cpus_per_worker, found.gpus_per_worker, found.on_gpu) == (workers, cpus, gpus, on_gpu)
    assert found.cpus == workers * cpus
    assert validate_study(study.resolved(), "resolved") == study


def test_workers_of_a_trial_may_be_on_several_nodes(studied: Studied) -> None:
    study = studied("resources={gpus_per_trial: 4, cpus_per_trial: 8}")
    check_one_trial_fits(study, [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 2.0}])
    with pytest.raises(InputError, match=r"each of the 4 workers of a trial asks for 2 CPUs and 1 GPUs of one node"):
        check_one_trial_fits(study, [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 2.0}])
