"""What a person sees while a search runs and when it ends."""

import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..analysis.hint_selection import HintSelection
from ..analysis.trials import SearchRecord, TrialRow
from ..analysis.verdict import describe_sizes
from ..distill.loss_names import TOGETHER, names_together
from ..distill.trainer import EpochResult
from ..models.candidates import Candidate
from .export import HintFile, load_hints
from .layers import LayerPass, Layers
from .retrain import RetrainedStudent
from .study_types import STUDENT_PARAMETERS
from .teacher import Teacher
from .training import TrainingReport

# Tables are wider than the 80 columns that a pipe or a log file is taken to have.
WIDTH_WITHOUT_TERMINAL = 150
# A registry with more facts than these has them in one column, which wraps.
MOST_COLUMNS = 6


@dataclass(frozen=True)
class LayerProgress:
    """Where a layer pass reports to.

    Attributes:
        on_images: takes the number of images done so far.
        on_bootstrap: takes the number of bootstraps done so far.
    """

    on_images: Callable[[int], None]
    on_bootstrap: Callable[[int], None]


class View:
    """Shows progress and tables on a console.

    Args:
        json_output: whether stdout is for one JSON document: everything else then goes to stderr.
    """

    def __init__(self, json_output: bool = False) -> None:
        stream = sys.stderr if json_output else sys.stdout
        width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
        self.console = Console(file=stream, width=width, highlight=False, soft_wrap=False)
        # Of this moment: while Ray runs, what libraries print goes to stderr.
        self._document_to = sys.stdout if json_output else None

    def say(self, text: str) -> None:
        """One line; long ones are left to the terminal to wrap, so that paths can be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    def notes(self, *texts: str | None) -> None:
        """Those that there are, a line each."""
        for text in filter(None, texts):
            self.say(text)

    def document(self, content: Any) -> None:
        """The JSON document of a command, if one was asked for."""
        if self._document_to is not None:
            print(json.dumps(content, default=str), file=self._document_to)

    @contextmanager
    def network_training(self, what: str) -> Iterator[TrainingReport]:
        """A progress bar over the epochs of a network that is trained before the search."""
        with self._progress("epochs") as progress:
            task = progress.add_task(f"training {what}", total=None)

            def on_epoch(result: EpochResult, epochs: int) -> None:
                progress.update(task, completed=result.epoch, total=epochs)

            yield TrainingReport(on_epoch, lambda precision, why: self.say(f"Training {what} in {precision} ({why})."))

    def layer_plan(self, layer_pass: LayerPass, actors: int) -> None:
        """What the layer pass will read and take, before it starts."""
        columns, memory = layer_pass.columns, layer_pass.memory
        self.say(
            f"Measuring {len(columns.channels)} layers with {sum(columns.channels):,} pooled channels on "
            f"{layer_pass.plan.images:,} images in {len(layer_pass.plan.chunks)} chunks; beside the network, each of "
            f"{actors} actors takes about {_size(memory.actor)}, this process {_size(memory.driver)}."
        )
        if columns.projected:
            self.say(
                f"To stay within layers.memory_gb, {columns.projected} layers are projected at random (seed "
                f"{columns.seed}) to {max(columns.widths)} columns: inner products keep a relative error of about "
                f"{max(columns.widths) ** -0.5:.1%}, and no rank exceeds {max(columns.widths)}."
            )

    @contextmanager
    def layer_pass(self, what: str, images: int, bootstraps: int = 0) -> Iterator[LayerProgress]:
        """A progress bar over the images of a layer pass, then over the bootstraps of its metrics."""
        with self._progress("") as progress:
            reading = progress.add_task(what, total=images, unit="images")
            drawing = progress.add_task("drawing image groups again", total=bootstraps, unit="times", visible=False)

            def on_bootstrap(done: int) -> None:
                progress.update(drawing, completed=done, visible=True)

            yield LayerProgress(lambda done: progress.update(reading, completed=done), on_bootstrap)

    def teacher(self, teacher: Teacher, trained: bool) -> None:
        """The teacher's accuracy and where its weights lie."""
        origin = "trained" if trained else "from"
        known = f"validation accuracy {teacher.val_accuracy:.2%}" if teacher.classifies else "features alone, no labels"
        self.say(f"Teacher {teacher.spec.name}: {known} ({origin} {teacher.path}, sha256 {teacher.sha256[:12]})")

    def layers(self, layers: Layers) -> None:
        """Tables with a row a candidate: shape, cost and scores; distances to the next one."""
        distances, candidates = layers.distances, layers.candidates
        shapes = {
            "channels": [str(candidate.channels) for candidate in candidates],
            "size": [f"{candidate.height}×{candidate.width}" for candidate in candidates],
            "multiply-adds": [f"{candidate.multiply_adds:,}" for candidate in candidates],
        }
        scores = {name: [f"{value:.3f}" for value in values] for name, values in distances.scores.items()}
        steps = {
            name: [f"{matrix[place, place + 1]:.3f}" for place in range(len(candidates) - 1)]
            for name, matrix in distances.distances.items()
            if name not in scores
        }
        self._by_layer(
            f"Candidate layers of the teacher, measured on {distances.images:,} images", candidates, shapes | scores
        )
        if steps and len(candidates) > 1:
            self._by_layer("Distance of each layer to the next", candidates[:-1], steps)

    def _by_layer(self, title: str, candidates: Sequence[Candidate], columns: Mapping[str, Sequence[str]]) -> None:
        """One row a candidate; as many tables as the columns need."""
        taken = 12 + max(len(candidate.path) for candidate in candidates)
        part: dict[str, Sequence[str]] = {}
        for name, cells in columns.items():
            width = sum(_column_width(*column) for column in part.items()) + _column_width(name, cells)
            if part and taken + width > self.console.width:
                self._table_by_layer(title, candidates, part)
                part = {}
            part[name] = cells
        self._table_by_layer(title, candidates, part)

    def _table_by_layer(
        self, title: str, candidates: Sequence[Candidate], columns: Mapping[str, Sequence[str]]
    ) -> None:
        table = Table(title=title)
        table.add_column("#", justify="right")
        table.add_column("layer")
        for column in columns:
            table.add_column(column, justify="right")
        for candidate, *cells in zip(candidates, *columns.values(), strict=True):
            table.add_row(str(candidate.index), candidate.path, *cells)
        self.console.print(table)

    def selection(self, selection: HintSelection, pairs: Sequence[tuple[str, str]], pairing: str) -> None:
        """The chosen hint points, the candidates each stands for, and the student layers they are paired with."""
        weights = [f"={weight:g}" for weight in selection.weights] or [""] * len(selection.metrics)
        metrics = ", ".join(name + weight for name, weight in zip(selection.metrics, weights, strict=True))
        how = f"{selection.selector} on {metrics}" if metrics else selection.selector
        table = Table(title=f"Hint points by {how}; paired {pairing}")
        for column in ("hint point", "#", "stands for", "student layer"):
            table.add_column(column)
        rows = zip(selection.points, selection.indices, selection.clusters, pairs, strict=True)
        for point, index, members, (_, student) in rows:
            table.add_row(point, str(index), _ranges(members), student)
        self.console.print(table)
        told = []
        if selection.silhouette is not None:
            told.append(f"medoid silhouette {selection.silhouette:.3f}")
        if selection.stability is not None:
            told.append(f"stability {selection.stability:.3f} (adjusted Rand index over bootstraps of the images)")
        if told:
            self.say(", ".join(told))

    def figures(self, paths: Sequence[Path]) -> None:
        """Where pictures were written."""
        self.say("Pictures: " + ", ".join(os.path.relpath(path) for path in paths))

    def leaderboard(self, record: SearchRecord, trials: Sequence[TrialRow] | None = None) -> None:
        """Completed trials best first, control arms marked; then how the others ended.

        Repeats with fresh seeds have a table of their own, unless `trials` has them.
        """
        completed = [t for t in record.trials if t.outcome == "completed" and t.arm != "confirm"]
        shown = completed if trials is None else list(trials)
        table = Table(title=f"Leaderboard of {record.name} by {record.metric}")
        columns = ("trial", "arm", "hint points from", "K", "hint points", "loss", "β hint", "α logit", "τ", "epochs")
        for column in (*columns, record.metric):
            table.add_column(
                column, justify="left" if column in ("arm", "hint points from", "hint points") else "right"
            )
        if trials is not None:
            table.add_column("outcome")
        for row in shown:
            cells = trial_cells(row.arm, row.control, row.parameters)
            value = f"{row.metrics[record.metric]:.4f}" if record.metric in row.metrics else ""
            outcome = [row.outcome] if trials is not None else []
            style = "bold" if row.arm == "search" else "cyan"
            table.add_row(str(row.number), *cells, str(row.epochs), value, *outcome, style=style)
        if shown:
            self.console.print(table)
        self.say(", ".join(f"{count} {outcome}" for outcome, count in _outcomes(record).items()) + " trials")

    def verdict(self, record: SearchRecord, validation_images: int) -> None:
        """What the leaderboard allows to say, in words; a null is called a null."""
        found, control = record.best("search"), record.best("control")
        if control is None:
            return
        if found is None:
            ends = Counter(trial.outcome for trial in record.trials if trial.arm == "search")
            others = ", ".join(f"{count} {outcome}" for outcome, count in ends.items() if outcome != "pruned")
            said = (
                f"No search trial came to its end ({others}): nothing is known of them."
                if others
                else "Every search trial was behind the controls and stopped at a rung: a null result."
            )
            self.say(
                f"{said} Best control: {control.control} (trial {control.number}), "
                f"{record.metric} {control.metrics[record.metric]:.4f}."
            )
            return
        ours, theirs = found.metrics[record.metric], control.metrics[record.metric]
        gain = ours - theirs if record.direction == "maximize" else theirs - ours
        said = (
            f"Best of the search: trial {found.number}, {record.metric} {ours:.4f}. "
            f"Best control: {control.control} (trial {control.number}), {theirs:.4f}. "
        )
        if gain <= 0:
            self.say(said + "No searched configuration beat the best control: a null result.")
            return
        if record.metric == "val_accuracy":
            error = math.sqrt(theirs * (1 - theirs) / validation_images)
            said += (
                f"A lead of {100 * gain:.1f} points; one accuracy on {validation_images} validation images has a "
                f"standard error of {100 * error:.1f}. "
            )
        trials = sum(t.arm == "search" for t in record.trials)
        self.say(said + f"It is the best of {trials} with one seed each: retrain it with several seeds to know.")
        self.sizes(found, control)

    def sizes(self, winner: TrialRow, control: TrialRow) -> None:
        """That two students are not of one size, if so."""
        said = describe_sizes(winner.metrics.get(STUDENT_PARAMETERS), control.metrics.get(STUDENT_PARAMETERS))
        if said:
            self.say(said)

    def hint_points(self, hints: Path) -> None:
        """The pairs and weights of an exported file."""
        content = load_hints(hints)
        table = Table(title=f"Hint configuration of trial {content.trial}")
        for column in ("hint point", "student layer", "loss", "β", "normaliser"):
            table.add_column(column)
        for pair in content.hints.pairs:
            normaliser = _short(pair.normaliser)
            table.add_row(pair.teacher_layer, pair.student_layer, pair.loss, _short(pair.weight), normaliser)
        if content.hints.pairs:
            self.console.print(table)
        else:
            self.say(f"Trial {content.trial} has no hint points.")
        weights = content.hints
        parts = [
            f"γ classification {_short(weights.classification_weight)}",
        ]
        if weights.logit_weight > 0:
            parts.append(f"α {weights.logit_loss} {_short(weights.logit_weight)}, τ {_short(weights.temperature)}")
        if weights.embedding_weight > 0:
            parts.append(f"β {weights.embedding_loss} of the penultimate features {_short(weights.embedding_weight)}")
        parts += [] if weights.normalise else ["all of them raw"]
        parts += ["after a warm-up by InDistill"] if weights.warmup else []
        parts += ["with weights for each image by HKD"] if weights.dynamic_weights else []
        self.say(", ".join(parts))

    @contextmanager
    def retraining(self, seeds: int, epochs: int) -> Iterator[Callable[[int, EpochResult], None]]:
        """A progress bar over the epochs of all students."""
        with self._progress("epochs") as progress:
            task = progress.add_task("training students", total=seeds * epochs)
            yield lambda _seed, _result: progress.advance(task)

    def retrained(self, hints: HintFile, students: Sequence[RetrainedStudent], repeats: bool) -> None:
        """One row a student, mean and spread, and, if it should, whether the first repeats the exported figure."""
        table = Table(title=f"Students retrained from trial {hints.trial} of {hints.search}")
        # What decided the search, beside accuracy.
        decisive = hints.evidence.metric.removeprefix("val_")
        shown = list(dict.fromkeys(["accuracy", decisive]))
        figures = [f"{split} {name}" for name in shown for split in ("validation", "test")]
        for column in ("data seed", "init seed", *figures, "weights"):
            table.add_column(column, overflow="fold")
        for student in students:
            values = [value for name in shown for value in (student.validation[f"val_{name}"], student.test[name])]
            cells = [f"{value:.4f}" for value in values]
            table.add_row(str(student.data_seed), str(student.init_seed), *cells, str(student.path))
        self.console.print(table)
        for name in shown if len(students) > 1 else []:
            tested = [student.test[name] for student in students]
            mean, sd = statistics.mean(tested), statistics.stdev(tested)
            self.say(f"Test {name} {mean:.4f} ± {sd:.4f} (mean ± sd of {len(students)} init seeds)")
        if repeats:
            again, exported = students[0].validation[hints.evidence.metric], hints.evidence.value
            said = "exactly the exported figure" if again == exported else f"the export says {exported:.6f}"
            self.say(f"First student's {hints.evidence.metric}: {again:.6f}, {said}")

    def entries(self, title: str, entries: Sequence[Mapping[str, str]]) -> None:
        """A registry as a table."""
        table = Table(title=title)
        columns = list(dict.fromkeys(key for entry in entries for key in entry))
        if len(columns) > MOST_COLUMNS:
            entries = [_in_three_columns(entry) for entry in entries]
            columns = list(entries[0])
        for column in columns:
            # A name is there to be copied.
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        for entry in entries:
            table.add_row(*(entry.get(column, "") for column in columns))
        self.console.print(table)

    def _progress(self, unit: str) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit or "{task.fields[unit]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )


def trial_cells(arm: str, control: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """A trial's arm, origin and number of hint points, points, loss and weights as short texts."""
    metrics = str(parameters.get("hints.metrics", "")).replace(",", " ")
    selector = str(parameters.get("hints.selector", control))
    points = str(parameters.get("hints.points", ""))
    return (
        arm,
        f"{selector} {metrics}".strip(),
        str(len(points.split(","))) if points else "",
        points.replace("layer", "").replace(",", " "),
        loss_cell(parameters),
        " ".join(_short(parameters[name]) for name in hint_weight_names(parameters)),
        _logit_cell(parameters),
        _short(parameters.get("temperature")),
    )


def loss_cell(parameters: Mapping[str, Any]) -> str:
    """The hint losses, and that of the penultimate features in brackets; of somebody's own the function alone."""
    losses = TOGETHER.join(_function(name) for name in names_together(str(parameters.get("loss.hint", ""))))
    embedding = parameters.get("loss.embedding")
    return f"{losses} ({_function(str(embedding))})".strip() if embedding else losses


def _function(name: str) -> str:
    """A loss's name; of somebody's own the function alone."""
    return name.rpartition(":")[2]


def hint_weight_names(parameters: Mapping[str, Any]) -> list[str]:
    """The parameters that hold weights of hint losses, in the order of `loss_cell`."""
    hints = sorted(name for name in parameters if name == "weight.hint" or name.startswith("weight.hint."))
    return [*hints, *(["weight.embedding"] if "loss.embedding" in parameters else [])]


def _logit_cell(parameters: Mapping[str, Any]) -> str:
    """The weight of the logit loss, and its name unless it is the usual one."""
    name = parameters.get("loss.logit", "kd")
    return " ".join([_short(parameters.get("weight.logit")), *([] if name == "kd" else [_function(str(name))])])


def _in_three_columns(entry: Mapping[str, str]) -> dict[str, str]:
    """Name, source, and all other facts in one text."""
    facts = "; ".join(f"{key}: {value}" for key, value in entry.items() if key not in ("name", "source"))
    return {"name": entry["name"], "declared": facts, "source": entry.get("source", "")}


def _column_width(name: str, cells: Sequence[str]) -> int:
    return 3 + max(len(text) for text in (name, *cells))


def _ranges(members: Sequence[int]) -> str:
    """1-based indices with runs shortened: 1–4, 6."""
    runs: list[list[int]] = []
    for member in sorted(members):
        if runs and member == runs[-1][-1] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _size(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _short(value: Any) -> str:
    if value is None or value == "":
        return ""
    return f"{float(value):.3g}"


def _outcomes(record: SearchRecord) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in record.trials:
        counts[trial.outcome] = counts.get(trial.outcome, 0) + 1
    return counts
