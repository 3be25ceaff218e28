"""The MLflow run of a search as a whole: all that comparing and exporting needs, logged before the first trial."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ..analysis.trials import SEARCH_FILE
from ..distill.execution import Execution
from ..models.own_code import is_own_code, own_code_sha256
from ..models.weights import StateDict, save_weights, weights_sha256
from ..models.zoo import ModelSpec
from .events import Tracked
from .export import provenance
from .figures import layer_pictures
from .journal import SearchLog
from .layers import write_distances
from .own_code import code_identities
from .preparation import Preparation
from .specs import student_spec
from .study import Study
from .tracking import TrackedSearch, connect

DISTANCES_FILE = "distances.npz"
# A folder of the search, and of its parent run.
FIGURES = "figures"
TEACHER_ARTIFACT = "teacher/teacher.safetensors"
# Of the weights that students start from.
START_ARTIFACT = "student/start.safetensors"


def open_parent_run(log: SearchLog, study: Study, preparation: Preparation, execution: Execution) -> TrackedSearch:
    """The parent run, with everything that comparing and exporting needs, before the first trial."""
    began, folder = log.history.began, log.path.parent
    assert began is not None
    client = connect(began.tracking_uri, create=True)
    tracked = TrackedSearch(client, study.name, began.name, log.history.parent_run_id)
    if log.history.parent_run_id is None:
        log.record(Tracked(0, tracked.parent_run_id))
    write_distances(folder / DISTANCES_FILE, preparation.layers.distances)
    tracked.set_running(tracked.parent_run_id)
    tracked.tag_parent(
        {
            "objective": study.objective.metric,
            "direction": study.objective.direction,
            **({"against": study.objective.against} if study.objective.against else {}),
            "teacher.sha256": preparation.teacher.sha256,
            "precision": execution.precision,
            **{f"code.{key}": f"{path} sha256:{sha256}" for key, path, sha256 in code_identities(study)},
        }
    )
    tracked.add_documents(
        {
            "study.yaml": yaml.safe_dump(study.resolved(), sort_keys=False),
            "space.json": study.space.model_dump(mode="json"),
            SEARCH_FILE: search_document(study, preparation, execution),
        }
    )
    tracked.add_file(folder / DISTANCES_FILE, "layers")
    for picture in layer_pictures(folder / FIGURES, preparation.layers):
        tracked.add_file(picture, FIGURES)
    _add_weights(tracked, TEACHER_ARTIFACT, preparation.teacher.weights)
    if preparation.start is not None:
        _add_weights(tracked, START_ARTIFACT, preparation.start)
    return tracked


def _add_weights(tracked: TrackedSearch, artifact: str, weights: StateDict) -> None:
    place = Path(artifact)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / place.name
        save_weights(file, weights)
        tracked.add_file(file, str(place.parent))


def search_document(study: Study, preparation: Preparation, execution: Execution) -> dict[str, Any]:
    """What an export says of the search as a whole, as an artifact of the parent run."""
    teacher, splits = preparation.teacher, preparation.splits
    return {
        "study": study.resolved(),
        "teacher": {
            **_model(teacher.spec),
            "candidates": study.layers.candidates,
            "sha256": teacher.sha256,
            "path": str(teacher.path),
            "artifact": TEACHER_ARTIFACT,
            "val_accuracy": teacher.val_accuracy,
        },
        "student": {**_model(student_spec(study, splits)), "start": _start(study, preparation)},
        "data": {**asdict(study.data_spec()), "mean": list(splits.mean), "sd": list(splits.sd)},
        "training": {
            "recipe": asdict(study.recipe.recipe()),
            "rungs": list(study.budget.rungs),
            "device": execution.device,
            "precision": execution.precision,
            "compile": execution.compile,
            "threads": study.resources.cpus_per_worker,
        },
        "loss_code_sha256": {name: own_code_sha256(name) for name in study.losses() if is_own_code(name)},
        "data_code_sha256": own_code_sha256(study.data.name) if is_own_code(study.data.name) else None,
        "validation_images": len(splits.validation),
        "provenance": provenance(version("hintsearch")),
    }


def _start(study: Study, preparation: Preparation) -> dict[str, str] | None:
    """Where the weights lie that students start from."""
    if preparation.start is None:
        return None
    place = str(study.student.checkpoint)
    return {"sha256": weights_sha256(preparation.start), "path": place, "artifact": START_ARTIFACT}


def _model(spec: ModelSpec) -> dict[str, Any]:
    content = spec.to_dict()
    content["model"] = content.pop("name")
    return {**content, "factory_sha256": own_code_sha256(spec.name)}
