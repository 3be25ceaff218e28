"""A trial that several workers train together, by Ray Train; the trial itself waits for what the first one tells."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from ray import tune
from ray.util.queue import Empty, Queue

from ..distill.allocation import keep_freed_memory
from ..distill.workers import Workers
from ..models.errors import reason
from .collector import keep_what_there_is
from .epoch_reports import NOT_SHARED, EpochReports
from .shared_file import SharedFile
from .study_sections import ResourcesSection
from .trial import TrialContext, TrialTraining, last_checkpoint, told

# How often it is looked whether the workers are still there.
LOOK_SECONDS = 1.0
# Keys of what a worker tells: an epoch's figures, the folder of its checkpoint, whether it was the last; or why the
# trial cannot go on.
EPOCH, CHECKPOINT, OVER, FAILED = "epoch", "checkpoint", "over", "failed"


def by_workers(file: SharedFile, resources: ResourcesSection) -> Callable[[dict[str, Any]], None]:
    """The function trainable of such trials; it reports and fails as `run_trial` does.

    Args:
        file: has the `TrialContext` that all workers of all trials share.
        resources: of the study.
    """
    # What is captured is sent with every trial.
    group = _Group(
        file, resources.workers, resources.on_gpu, float(resources.cpus_per_worker), resources.gpus_per_worker
    )

    def wait_for_workers(config: dict[str, Any]) -> None:
        start = last_checkpoint(config)
        reports = EpochReports()
        for message in group.run(config, start.path if start else None):
            if FAILED in message:
                reports.fail(message[FAILED])
                return
            reports.add(message[EPOCH])
            folder = message[CHECKPOINT]
            if folder:
                reports.send(checkpoint=tune.Checkpoint.from_directory(folder))
                shutil.rmtree(folder)
            elif message[OVER] or reports.due:
                reports.send()

    return wait_for_workers


def workers_folder(results: Path) -> Path:
    """Where the workers of a search's trials leave their checkpoints for them; gone when the search is over."""
    return results / "workers"


class _Group:
    """The workers of one trial after the other.

    Args:
        file: has the `TrialContext`.
        workers: how many.
        on_gpu: whether each computes on a GPU.
        cpus: of each.
        gpus: of each.
    """

    def __init__(self, file: SharedFile, workers: int, on_gpu: bool, cpus: float, gpus: float) -> None:
        self._file, self._workers, self._on_gpu = file, workers, on_gpu
        self._each = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}

    def run(self, config: dict[str, Any], start: str | None) -> Iterator[dict[str, Any]]:
        """What the workers tell, until they are done.

        Args:
            config: of the trial.
            start: folder of the checkpoint that they go on from; None: they start anew.

        Raises:
            Exception: a worker raised, or its process died.
        """
        # Tune's own folder of a trial lies on the machine of its process, where workers on others do not see it.
        storage = workers_folder(Path(self._file.path).parent)
        storage.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{config['number']}-", dir=storage)
        # One epoch ahead of what has been reported, and no more.
        queue = Queue(1, actor_options={"num_cpus": 0})
        loop = {"file": self._file, "config": config, "start": start, "folder": folder, "queue": queue}
        errors: list[Exception] = []
        fit = Thread(target=self._fit, args=(loop, errors), daemon=True)
        fit.start()
        while True:
            was_running = fit.is_alive()
            try:
                yield queue.get(timeout=LOOK_SECONDS)
            except Empty:
                if not was_running:
                    break
        shutil.rmtree(folder, ignore_errors=True)
        for error in errors:
            raise error

    def _fit(self, loop: dict[str, Any], errors: list[Exception]) -> None:
        # Whatever the environment says; it is read at the import.
        os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        try:
            TorchTrainer(
                _work,
                train_loop_config=loop,
                scaling_config=ScalingConfig(
                    num_workers=self._workers, use_gpu="GPU" in self._each, resources_per_worker=self._each
                ),
                torch_config=TorchConfig(backend="nccl" if self._on_gpu else "gloo"),
                run_config=RunConfig(name="workers", storage_path=loop["folder"]),
            ).fit()
        except Exception as error:
            errors.append(error)


def _work(loop: dict[str, Any]) -> None:
    """One worker's part of a trial."""
    queue: Queue = loop["queue"]
    try:
        context: TrialContext = loop["file"].read()
    except (OSError, ValueError) as error:
        queue.put({FAILED: {NOT_SHARED: reason(error)}})
        return
    if not gc.get_freeze_count():
        keep_what_there_is()
    keep_freed_memory()
    torch.set_num_threads(context.threads)
    workers = Workers.of_this_process()
    if context.execution.device == "cuda":
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    try:
        _train(loop, context, workers)
    except Exception as error:
        why = told(error)
        if why is None:
            raise
        queue.put({FAILED: why})


def _train(loop: dict[str, Any], context: TrialContext, workers: Workers) -> None:
    start = Path(loop["start"]) if loop["start"] else None
    training = TrialTraining(loop["config"], context, replace(context.execution, workers=workers), start)
    for metrics in training.epochs():
        if workers.rank:
            continue
        folder: Path | None = None
        if training.checkpoint_due:
            folder = Path(loop["folder"]) / f"epoch-{metrics['epoch']}"
            # With its parents: a file server's client may not have heard of them yet.
            folder.mkdir(parents=True, exist_ok=True)
            training.save(folder)
        loop["queue"].put({EPOCH: metrics, CHECKPOINT: str(folder) if folder else None, OVER: training.over})
