"""The hint terms of a student's loss: each one a hint loss, of one pair or of several."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..models.candidates import list_candidates
from ..models.end_activation import end_activation
from ..models.errors import InputError
from ..models.penultimate import classifier_path
from ..models.taps import INPUT
from .execution import Execution
from .hint_configuration import HintConfiguration, HintPair
from .loss_names import HINT_LOSS, checked_loss, find_hint_loss
from .losses import AnyHintLoss, FeatureShape, HintLoss, JointHintLoss, Samples, TeacherLayer

EMBEDDING = "embedding"

_Kind = type[HintLoss] | type[JointHintLoss]


class HintTerm(nn.Module):
    """One hint loss with the layers it reads.

    Args:
        pairs: what it is of: one pair, or all that name a joint loss.
        loss: made for them.
        student_taps: paths read of the student, one a pair.
        teacher_taps: paths read of the teacher, one a pair.
        name: what tells terms apart in tables and metrics; None: the loss and the teacher's first layer.
    """

    def __init__(
        self,
        pairs: Sequence[HintPair],
        loss: AnyHintLoss,
        student_taps: Sequence[str],
        teacher_taps: Sequence[str],
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.pairs, self.loss = tuple(pairs), loss
        # Of somebody's own loss the function alone: a path may hold what no metric's name may.
        self.name = name or f"{pairs[0].loss.rpartition(':')[2]}.{pairs[0].teacher_layer}"
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)

    @property
    def weight(self) -> float:
        """β; of a joint loss that of its pairs, which is one."""
        return self.pairs[0].weight

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        samples: Samples,
        execution: Execution,
        whole: Samples | None = None,
    ) -> Tensor:
        """The raw loss of features by tap: of each image [B], or a scalar where it is one of the whole batch.

        Adapters run in the precision of the networks, the loss in float32.

        Args:
            student: features of the student.
            teacher: features of the teacher.
            samples: which images they are of.
            execution: how adapters run, and with which workers.
            whole: the images of the whole batch, where these are a worker's share.
        """
        ours, theirs = [student[path] for path in self.student_taps], [teacher[path] for path in self.teacher_taps]
        with execution.autocast():
            if isinstance(self.loss, JointHintLoss):
                ours, theirs = self.loss.adapt(ours, theirs)
            else:
                ours[0], theirs[0] = self.loss.adapt(ours[0], theirs[0])
        ours, theirs = [our.float() for our in ours], [their.float() for their in theirs]
        compared, workers = samples, execution.workers
        if whole is not None and self.loss.couples:
            compared = whole
            ours, theirs = ([workers.gather(one, len(whole.labels)) for one in both] for both in (ours, theirs))
        if isinstance(self.loss, JointHintLoss):
            value = self.loss.compare(ours, theirs)
        else:
            value = self.loss.compare_samples(ours[0], theirs[0], compared)
        value = checked_loss(value, len(compared.labels), f"{HINT_LOSS} {self.pairs[0].loss!r}")
        # Of what was compared with the whole batch, this process's images count here.
        return value if compared is samples else workers.share(value)


def make_hint_terms(
    hints: HintConfiguration,
    student: nn.Module,
    teacher: nn.Module,
    student_shape: tuple[int, int, int],
    teacher_shape: tuple[int, int, int],
    labels: Tensor | None,
) -> list[HintTerm]:
    """The terms of a configuration; pairs of weight 0 are left out.

    Args:
        hints: the configuration.
        student: with its own parameters.
        teacher: with its own parameters, not folded.
        student_shape: (channels, height, width) of one image as the student takes it.
        teacher_shape: the same for the teacher.
        labels: int64 [N] of all training images, for the losses that read them; None: there are none.

    Raises:
        InputError: a layer that one of the networks does not have, an unknown loss, layers that do not suit a loss.
    """
    spans: list[tuple[str | None, _Kind, list[HintPair]]] = [
        (None, kind, together) for kind, together in _spans(hints.active_pairs)
    ]
    if hints.embedding_weight > 0:
        ours, theirs = (
            f"{classifier_path(network, shape)}{INPUT}"
            for network, shape in ((student, student_shape), (teacher, teacher_shape))
        )
        pair = HintPair(theirs, ours, hints.embedding_loss, hints.embedding_weight)
        spans.append((EMBEDDING, find_hint_loss(pair.loss), [pair]))
    our_taps = [
        _taps(student, student_shape, [pair.student_layer for pair in pairs], kind, "student")
        for _, kind, pairs in spans
    ]
    their_taps = [
        _taps(teacher, teacher_shape, [pair.teacher_layer for pair in pairs], kind, "teacher")
        for _, kind, pairs in spans
    ]
    our_shapes, their_shapes = (
        _shapes(network, shape, taps)
        for network, shape, taps in ((student, student_shape, our_taps), (teacher, teacher_shape, their_taps))
    )
    terms: list[HintTerm] = []
    for (name, kind, pairs), ours_read, theirs_read in zip(spans, our_taps, their_taps, strict=True):
        loss = _loss(kind, [our_shapes[path] for path in ours_read], [their_shapes[path] for path in theirs_read])
        if isinstance(loss, HintLoss):
            loss.read_teacher(TeacherLayer(teacher, pairs[0].teacher_layer, teacher_shape))
        if labels is not None:
            loss.read_training_set(labels)
        terms.append(HintTerm(pairs, loss, ours_read, theirs_read, name))
    return terms


def teacher_terms(hints: HintConfiguration) -> int:
    """How many terms of a configuration read the teacher: the logit loss, and each hint term."""
    return len(_spans(hints.active_pairs)) + (hints.logit_weight > 0) + (hints.embedding_weight > 0)


def _loss(kind: _Kind, students: list[FeatureShape], teachers: list[FeatureShape]) -> AnyHintLoss:
    return kind(students, teachers) if issubclass(kind, JointHintLoss) else kind(students[0], teachers[0])


def _spans(pairs: Sequence[HintPair]) -> list[tuple[_Kind, list[HintPair]]]:
    """The loss and the pairs of each term: one, or all of a joint loss, which stand where the first of them does."""
    kinds = {name: find_hint_loss(name) for name in dict.fromkeys(pair.loss for pair in pairs)}
    spans: list[tuple[_Kind, list[HintPair]]] = []
    joint: dict[str, list[HintPair]] = {}
    for pair in pairs:
        kind = kinds[pair.loss]
        if pair.loss in joint:
            joint[pair.loss].append(pair)
            continue
        spans.append((kind, [pair]))
        if issubclass(kind, JointHintLoss):
            joint[pair.loss] = spans[-1][1]
    for name, together in joint.items():
        weights = {pair.weight for pair in together}
        if len(weights) > 1:
            raise InputError(
                f"the pairs of the joint hint loss {name} have the weights {sorted(weights)}, but it is one term; give "
                "all of them one weight"
            )
    return spans


def _taps(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    layers: Sequence[str],
    kind: _Kind,
    whose: str,
) -> list[str]:
    """The paths to read: before an activation, where a loss wants that, what the one that ends a layer is given."""
    if whose not in kind.pre_activation:
        return list(layers)
    activations = [None if path.endswith(INPUT) else end_activation(network, path, image_shape) for path in layers]
    return [f"{found}{INPUT}" if found else path for path, found in zip(layers, activations, strict=True)]


def _shapes(
    network: nn.Module, image_shape: tuple[int, int, int], taps: Sequence[Sequence[str]]
) -> dict[str, FeatureShape]:
    """The shape of each path that is read, by one pass over the network."""
    paths = list(dict.fromkeys(path for read in taps for path in read))
    if not paths:
        return {}
    found = list_candidates(network, image_shape, paths)
    return {candidate.path: FeatureShape(candidate.channels, candidate.height, candidate.width) for candidate in found}
