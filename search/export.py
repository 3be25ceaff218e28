"""The exported hint configuration: one file that says what was found and retrains any student."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import mlflow
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..analysis.confirmation import ConfigurationSummary
from ..analysis.pairing import BY_DEPTH
from ..analysis.trials import SEARCH_FILE, SearchRecord, TrialRow
from ..analysis.verdict import describe
from ..distill.hint_configuration import HintConfiguration
from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.preprocessing import Preprocessing
from ..models.zoo import ModelSpec
from .mlflow_logger import HINT_FILE
from .study import explain
from .study_file import YAML_ERRORS
from .suggestions import STUDENT_WIDTH

VERSION: Literal[1] = 1
_HEADER = "# A hint configuration of hintsearch. Retrain a student with it: hintsearch distill {name}\n"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PreprocessingPart(_Part):
    """How a network takes its images."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"


class ModelPart(_Part):
    """A network by its factory; `factory_sha256` is of the file behind one's own factory."""

    model: str
    num_classes: int
    in_channels: int
    width: float = 1.0
    factory_sha256: str | None = None
    preprocessing: PreprocessingPart | None = None

    def spec(self) -> ModelSpec:
        """What `build_model` takes."""
        takes = Preprocessing(**self.preprocessing.model_dump()) if self.preprocessing else None
        return ModelSpec(self.model, self.num_classes, self.in_channels, self.width, takes)


class StartPart(_Part):
    """The weights that students start from: their hash, and where they lay."""

    sha256: str
    path: str
    artifact: str


class StudentPart(ModelPart):
    """The student, and the weights it starts from unless they are random."""

    start: StartPart | None = None


class TeacherPart(ModelPart):
    """The teacher: factory, its candidates if the study named them, hash of its weights, and where they lay."""

    candidates: tuple[str, ...] | None = None
    sha256: str
    path: str
    tracking_uri: str
    run_id: str
    artifact: str
    val_accuracy: float


class PairPart(_Part):
    """A hint pair; its normaliser is the constant of the exporting trial, computed anew for another student."""

    teacher_layer: str
    student_layer: str
    loss: str
    weight: float = Field(ge=0)
    normaliser: float | None = None


class HintsPart(_Part):
    """The loss: pairs and weights, and the hashes of the files behind losses of somebody's own."""

    pairs: list[PairPart]
    classification_weight: float = Field(ge=0)
    logit_weight: float = Field(ge=0)
    logit_loss: str
    temperature: float = Field(gt=0)
    embedding_weight: float = Field(default=0, ge=0)
    embedding_loss: str = "pkt_symmetric"
    normalise: bool = True
    warmup: dict[str, Any] | None = None
    dynamic_weights: dict[str, Any] | None = None
    loss_code_sha256: dict[str, str] = {}

    @model_validator(mode="after")
    def _readable(self) -> Self:
        self.configuration()
        return self

    def configuration(self) -> HintConfiguration:
        """What the trainer takes.

        Raises:
            InputError: a warm-up or dynamic weights with keys or values that are none.
        """
        content = self.model_dump(exclude={"loss_code_sha256"})
        pairs = [pair.model_dump(exclude={"normaliser"}) for pair in self.pairs]
        try:
            return HintConfiguration.from_dict({**content, "pairs": pairs})
        except TypeError as error:
            raise InputError(f"warmup or dynamic_weights has what this hintsearch does not know ({error})") from error

    def losses(self) -> tuple[str, ...]:
        """Every loss that the configuration names, each once; also those of weight 0, which may be loaded, too."""
        named = [*(pair.loss for pair in self.pairs), self.logit_loss, self.embedding_loss]
        warmup = self.configuration().warmup
        named += [warmup.loss] if warmup else []
        return tuple(dict.fromkeys(named))


class SelectionPart(_Part):
    """Why these points: how they were chosen, which candidates each stands for, and how they were paired."""

    selector: str
    metrics: list[str]
    indices: list[int]
    clusters: list[list[int]]
    weights: list[float] = []
    silhouette: float | None = None
    stability: float | None = None
    pairing: str = BY_DEPTH


class TrainingPart(_Part):
    """How the student was trained."""

    recipe: dict[str, Any]
    rungs: list[int]
    data_seed: int
    init_seed: int
    device: str = "cpu"
    precision: str = "fp32"
    compile: str = "off"
    threads: int


class ControlPart(_Part):
    """The best completed trial of a control arm."""

    control: str
    trial: int
    value: float


class ConfirmedPart(_Part):
    """A configuration that was repeated with fresh seeds: its trial, what came of it, and the MLflow runs."""

    trial: int
    control: str
    mean: float | None
    sd: float | None
    seeds: int
    run_ids: list[str]


class ComparisonPart(_Part):
    """The one test, stated before any repeat: the search's best against its best control, paired by seeds.

    Differences are positive where the search's best is better.
    """

    winner: int
    control: int
    control_name: str
    seeds: int
    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    effect_size: float | None
    verdict: str
    said: str


class ConfirmPart(_Part):
    """What held on fresh seeds."""

    configurations: list[ConfirmedPart]
    test: ComparisonPart | None


class EvidencePart(_Part):
    """What the choice rests on. `value` is of one seed: it says what won the search, not that it is better."""

    metric: str
    direction: str
    value: float
    seeds: int
    run_id: str
    controls: list[ControlPart]
    confirm: ConfirmPart | None = None


class HintFile(_Part):
    """The whole file."""

    version: Literal[1]
    search: str
    trial: int
    arm: str
    teacher: TeacherPart
    student: StudentPart
    data: dict[str, Any]
    data_code_sha256: str | None = None
    hints: HintsPart
    selection: SelectionPart | None
    training: TrainingPart
    evidence: EvidencePart
    provenance: dict[str, str]
    checksum: str = ""


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the checksum itself, as it stands in the file: parts added later change no old one."""
    signed = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True, default=str).encode()).hexdigest()


def export_hints(client: MlflowClient, record: SearchRecord, path: Path, trial: int | None = None) -> HintFile:
    """Writes the hint configuration of a trial, read from MLflow alone.

    Args:
        client: on the tracking store.
        record: the search.
        path: the file to write.
        trial: its number; None: the winner of the search.

    Raises:
        InputError: there is no completed trial to export.
    """
    check_output(path)
    row = record.winner() if trial is None else record.trial(trial)
    if row is None:
        raise InputError(f"{record.name} has no completed trial yet; let it go on by --resume")
    if row.outcome != "completed":
        raise InputError(f"trial {row.number} of {record.name} is {row.outcome}, but must be completed; choose another")
    content = hint_file(client, record, row)
    write_hints(path, content)
    return content


def hint_file(client: MlflowClient, record: SearchRecord, row: TrialRow) -> HintFile:
    """The hint configuration of a completed trial."""
    search = _document(client, record.parent_run_id, SEARCH_FILE)
    document = _document(client, row.run_id, HINT_FILE)
    hints, selection = document["hints"], document["selection"]
    pairs = [
        {**pair, "normaliser": row.metrics.get(f"normaliser_{i}")} for i, pair in enumerate(hints["pairs"], start=1)
    ]
    recipe = {**search["training"]["recipe"], "lr": document["parameters"]["lr"]}
    ours = [t for t in record.trials if t.arm == "control"]
    controls = sorted({t.control for t in ours})
    found = [next((t for t in ours if t.control == c and t.outcome == "completed"), None) for c in controls]
    content = HintFile(
        version=VERSION,
        search=record.name,
        trial=row.number,
        arm=row.arm,
        teacher=TeacherPart(**search["teacher"], tracking_uri=client.tracking_uri, run_id=record.parent_run_id),
        student=StudentPart(**{**search["student"], **_width(document["parameters"])}),
        data=search["data"],
        data_code_sha256=search.get("data_code_sha256"),
        hints=HintsPart(**{**hints, "pairs": pairs, "loss_code_sha256": search.get("loss_code_sha256", {})}),
        selection=_selection(selection, document["parameters"]) if selection else None,
        training=TrainingPart(**{**search["training"], **document["seeds"], "recipe": recipe}),
        evidence=EvidencePart(
            metric=record.metric,
            direction=record.direction,
            value=row.metrics[record.metric],
            seeds=max((summary.n for summary in _summaries(record, row)), default=1),
            run_id=row.run_id,
            controls=[
                ControlPart(control=t.control, trial=t.number, value=t.metrics[record.metric]) for t in found if t
            ],
            confirm=_confirmed(record),
        ),
        provenance={
            **search["provenance"],
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    return content.model_copy(update={"checksum": checksum(content.model_dump(mode="json"))})


def _width(parameters: Mapping[str, Any]) -> dict[str, float]:
    """The student's width, where it was searched."""
    return {"width": parameters[STUDENT_WIDTH]} if STUDENT_WIDTH in parameters else {}


def _summaries(record: SearchRecord, row: TrialRow) -> list[ConfigurationSummary]:
    confirmed = record.confirmation()
    return [summary for summary in confirmed.summaries if summary.number == row.number] if confirmed else []


def _confirmed(record: SearchRecord) -> ConfirmPart | None:
    confirmed = record.confirmation()
    if confirmed is None:
        return None
    test = None
    if confirmed.comparison is not None:
        compared = asdict(confirmed.comparison)
        shown = {key: compared[key] for key in ComparisonPart.model_fields if key in compared}
        test = ComparisonPart(**shown, seeds=confirmed.comparison.n, said=describe(confirmed.comparison, record.metric))
    return ConfirmPart(
        configurations=[
            ConfirmedPart(
                trial=summary.number,
                control=summary.control,
                mean=summary.mean,
                sd=summary.sd,
                seeds=summary.n,
                run_ids=[row.run_id for row in record.trials if row.confirms == summary.number],
            )
            for summary in confirmed.summaries
        ],
        test=test,
    )


def _selection(selection: Mapping[str, Any], parameters: Mapping[str, Any]) -> SelectionPart:
    reasons = {key: value for key, value in selection.items() if key != "points"}
    return SelectionPart(**reasons, pairing=parameters.get("hints.pairing", BY_DEPTH))


def write_hints(path: Path, content: HintFile) -> None:
    """Writes the file, whole or not at all."""
    text = yaml.safe_dump(content.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with replacing(path) as temporary:
        temporary.write_text(_HEADER.format(name=path.name) + text, encoding="utf-8")


def check_output(path: Path) -> None:
    """Raises `InputError` before any work is done if a file cannot be written there."""
    if path.is_dir():
        raise InputError(f"--output is {path}, but that is a folder; name a file in it")


def load_hints(path: str | Path) -> HintFile:
    """Reads an exported hint configuration.

    Raises:
        InputError: no such file, not such a file, another version, or changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no hint file {path}; write one by `hintsearch export NAME -o {path.name}`")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except YAML_ERRORS as error:
        raise InputError(f"{path} is no hint file ({reason(error)}); export it again") from error
    if not isinstance(content, dict) or "version" not in content:
        raise InputError(f"{path} is no hint file (it has no version); export it again")
    if content["version"] != VERSION:
        raise InputError(
            f"{path} has version {content['version']!r}, but this hintsearch reads {VERSION}; export it again"
        )
    try:
        hints = HintFile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {explain(error, HintFile)}, or export it again") from error
    if hints.checksum != checksum(content):
        raise InputError(f"{path} was changed after it was written (its checksum differs); export it again")
    return hints


def provenance(version: str) -> dict[str, str]:
    """Versions that the results depend on."""
    return {"hintsearch": version, "torch": str(torch.__version__), "mlflow": str(mlflow.__version__)}


def _document(client: MlflowClient, run_id: str, path: str) -> dict[str, Any]:
    try:
        local = client.download_artifacts(run_id, path)
    except (MlflowException, OSError) as error:
        raise InputError(
            f"the artifact {path} of run {run_id} cannot be read ({reason(error)}); check the store"
        ) from error
    content: dict[str, Any] = json.loads(Path(local).read_text())
    return content
