"""The hint losses once more, from their papers, in NumPy."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from hint_cases import Array, same_draws, samples_of, teacher_network
from hintsearch.distill.contrastive_loss import ContrastiveRepresentationDistillation
from hintsearch.distill.losses import AnyHintLoss
from scipy.stats import norm
from torch import nn

Golden = Callable[[AnyHintLoss, Sequence[Array], Sequence[Array]], float]
GOLDEN: dict[str, Golden] = {}


def golden(name: str) -> Callable[[Callable[[AnyHintLoss, Array, Array], float]], None]:
    """Enters what is of one pair."""

    def enter(of_pair: Callable[[AnyHintLoss, Array, Array], float]) -> None:
        GOLDEN[name] = lambda loss, students, teachers: of_pair(loss, students[0], teachers[0])

    return enter


def joint_golden(name: str) -> Callable[[Golden], None]:
    def enter(of_pairs: Golden) -> None:
        GOLDEN[name] = of_pairs

    return enter


def parameter(loss: AnyHintLoss, name: str) -> Array:
    values: Array = loss.get_parameter(name).detach().numpy()
    return values


def pooled(feature: Array, height: int, width: int) -> Array:
    """Means over blocks, which overlap where the size of the map is no multiple of the wanted one."""
    rows, columns = (
        [(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]
        for size, wanted in zip(feature.shape[2:], (height, width), strict=True)
    )
    means: Array = np.array([[feature[:, :, a:b, c:d].mean(axis=(2, 3)) for c, d in columns] for a, b in rows])
    return means.transpose(2, 3, 0, 1)


def to_smaller_map(student: Array, teacher: Array) -> tuple[Array, Array]:
    size = min(student.shape[2:], teacher.shape[2:], key=lambda shape: shape[0] * shape[1])
    return pooled(student, *size), pooled(teacher, *size)


def convolved(weight: Array, feature: Array) -> Array:
    """With zeros around, so that the map keeps its size."""
    height, width = feature.shape[2:]
    margin = weight.shape[2] // 2
    padded = np.pad(feature, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    found = np.zeros((len(feature), len(weight), height, width))
    for row, column in np.ndindex(weight.shape[2:]):
        window = padded[:, :, row : row + height, column : column + width]
        found += np.einsum("ts,bshw->bthw", weight[:, :, row, column], window)
    return found


def standardised(feature: Array) -> Array:
    """A new batch norm in training; a single value a channel is one in evaluation."""
    if feature.size == feature.shape[1]:
        mean, variance = np.zeros(1), np.ones(1)
    else:
        mean, variance = (moment(axis=(0, 2, 3), keepdims=True) for moment in (feature.mean, feature.var))
    scaled: Array = (feature - mean) / np.sqrt(variance + 1e-5)
    return scaled


def regressed(loss: AnyHintLoss, student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both of one size, the student after the loss's convolution if it has one."""
    student, teacher = to_smaller_map(student, teacher)
    if isinstance(loss.get_submodule("regressor"), nn.Identity):
        assert student.shape[1] == teacher.shape[1]
        return student, teacher
    weight, bias = (parameter(loss, f"regressor.{name}") for name in ("weight", "bias"))
    return convolved(weight, student) + bias[:, None, None], teacher


@golden("fitnet")
def golden_fitnet(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    assert parameter(loss, "regressor.weight").shape == (teacher.shape[1], student.shape[1], 1, 1)
    ours, theirs = regressed(loss, student, teacher)
    return float(((ours - theirs) ** 2).mean())


@golden("fitnet_3x3")
def golden_fitnet_3x3(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    assert parameter(loss, "regressor.weight").shape == (teacher.shape[1], student.shape[1], 3, 3)
    ours, theirs = regressed(loss, student, teacher)
    return float(((ours - theirs) ** 2).mean())


@golden("strongest_channels")
def golden_strongest_channels(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    filters = teacher_network(teacher.shape[1]).get_parameter("conv.weight").detach().numpy()
    strengths = [np.abs(one).sum() for one in filters]
    fewest = min(student.shape[1], teacher.shape[1])
    chosen = sorted(sorted(range(len(strengths)), key=lambda channel: -strengths[channel])[:fewest])
    ours, theirs = to_smaller_map(student, teacher)
    return float(np.mean([(ours[:, ours_at] - theirs[:, at]) ** 2 for ours_at, at in enumerate(chosen)]))


@golden("mse")
def golden_mse(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = regressed(loss, student, teacher)
    return float(((ours - theirs) ** 2).mean())


@golden("cosine")
def golden_cosine(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = regressed(loss, student, teacher)
    lengths = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
    return float((1 - (ours * theirs).sum(axis=1) / lengths).mean())


def attention_maps(student: Array, teacher: Array) -> tuple[Array, Array]:
    maps = []
    for feature in to_smaller_map(student, teacher):
        energy = (feature**2).mean(axis=1).reshape(len(feature), -1)
        maps.append(energy / np.sqrt((energy**2).sum(axis=1, keepdims=True)))
    return maps[0], maps[1]


@golden("at")
def golden_at(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = attention_maps(student, teacher)
    return float(((ours - theirs) ** 2).mean())


@golden("ft")
def golden_ft(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = attention_maps(student, teacher)
    return float(np.abs(ours - theirs).mean())


@golden("nst")
def golden_nst(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    """Squared distance of the mean outer products of the channels' unit maps: the kernel's feature space, spelt out."""
    total = 0.0
    for ours, theirs in zip(*to_smaller_map(student, teacher), strict=True):
        means = []
        for maps in (ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)):
            units = maps / np.linalg.norm(maps, axis=1, keepdims=True)
            means.append(np.mean([np.outer(unit, unit) for unit in units], axis=0))
        total += ((means[0] - means[1]) ** 2).sum()
    return float(total / len(student))


def hierarchical(ours: Array, theirs: Array) -> float:
    """Weights are halved from one level that is there to the next."""
    difference = ours - theirs
    errors = [(difference**2).mean()]
    errors += [(pooled(difference, side, side) ** 2).mean() for side in (4, 2, 1) if side < ours.shape[2]]
    return float(np.average(errors, weights=[0.5**level for level in range(len(errors))]))


@golden("hcl")
def golden_hcl(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    return hierarchical(*regressed(loss, student, teacher))


@golden("vid")
def golden_vid(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = to_smaller_map(student, teacher)
    for position in (0, 2, 4):
        ours = convolved(parameter(loss, f"regressor.{position}.weight"), ours)
        ours = np.maximum(ours, 0) if position < 4 else ours
    # Trained; 5 at the start.
    variance = np.log1p(np.exp(parameter(loss, "raw_variance"))) + 1e-5
    variance = variance[:, None, None]
    return float((0.5 * ((ours - theirs) ** 2 / variance + np.log(variance))).mean())


@golden("sp")
def golden_sp(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    grams = []
    for feature in (student, teacher):
        flat = feature.reshape(len(feature), -1)
        gram = flat @ flat.T
        grams.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    return float(np.linalg.norm(grams[0] - grams[1], "fro") ** 2 / len(student) ** 2)


def embedded(loss: AnyHintLoss, name: str, feature: Array) -> Array:
    weight, bias = (parameter(loss, f"{name}_embedding.{part}") for part in ("weight", "bias"))
    vectors: Array = feature.mean(axis=(2, 3)) @ weight.T + bias
    return vectors


@golden("cc")
def golden_cc(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    error = np.abs(embedded(loss, "student", student) - embedded(loss, "teacher", teacher))
    products = [float(one @ other) for one, other in itertools.pairwise(error)]
    return float(np.mean(products)) if products else 0.0


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


@golden("rkd")
def golden_rkd(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    distances, angles = [], []
    for feature in (student, teacher):
        vectors = feature.mean(axis=(2, 3))
        between = np.array([[np.linalg.norm(a - b) for b in vectors] for a in vectors])
        distances.append(between / between[between > 0].mean() if len(vectors) > 1 else between)
        found = []
        for at, one, other in itertools.product(vectors, repeat=3):
            lengths = np.linalg.norm(one - at) * np.linalg.norm(other - at)
            found.append((one - at) @ (other - at) / lengths if lengths > 0 else 0.0)
        angles.append(np.array(found))
    means = [np.mean([huber(x) for x in (pair[0] - pair[1]).ravel()]) for pair in (distances, angles)]
    return float(25 * means[0] + 50 * means[1])


def affinities(feature: Array, kernel: str) -> Array:
    """Rows that sum to 1."""
    vectors = feature.mean(axis=(2, 3))
    found = np.empty((len(vectors), len(vectors)))
    for (i, one), (j, other) in itertools.product(enumerate(vectors), repeat=2):
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        found[i, j] = (cosine + 1) / 2 if kernel == "cosine" else 1 / (1 + np.linalg.norm(one - other))
    shares: Array = found / found.sum(axis=1, keepdims=True)
    return shares


@golden("pkt")
def golden_pkt(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    q, p = affinities(student, "cosine"), affinities(teacher, "cosine")
    return float((p * np.log((p + 1e-7) / (q + 1e-7))).mean())


@golden("pkt_symmetric")
def golden_pkt_symmetric(_loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    total = 0.0
    for kernel in ("cosine", "distance"):
        q, p = affinities(student, kernel), affinities(teacher, kernel)
        # Jeffreys: both directions of the divergence.
        one, other = p * np.log((p + 1e-7) / (q + 1e-7)), q * np.log((q + 1e-7) / (p + 1e-7))
        total += float((one + other).mean())
    return total


def connected(loss: AnyHintLoss, student: Array, teacher: Array) -> tuple[Array, Array]:
    student, teacher = to_smaller_map(student, teacher)
    return standardised(convolved(parameter(loss, "connector.0.weight"), student)), teacher


@golden("ab")
def golden_ab(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    total = 0.0
    for ours, theirs in zip(*(side.ravel() for side in connected(loss, student, teacher)), strict=True):
        if theirs > 0 and ours <= 1:
            total += (ours - 1) ** 2
        elif theirs <= 0 and ours > -1:
            total += (ours + 1) ** 2
    return float(3 / 1000 * total / len(student))


def mean_negative(mean: float, deviation: float) -> float:
    """E[x | x < 0] of a normal distribution, by its closed form."""
    below = norm.cdf(0, mean, deviation)
    return float(mean - deviation**2 * norm.pdf(0, mean, deviation) / below) if below > 0.001 else -3 * deviation


@golden("ofd")
def golden_ofd(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    layer = teacher_network(teacher.shape[1])
    scales, shifts = (layer.get_parameter(f"norm.{name}").tolist() for name in ("weight", "bias"))
    total = 0.0
    ours, theirs = connected(loss, student, teacher)
    for channel, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
        margin = mean_negative(shift, abs(scale))
        for one, other in zip(ours[:, channel].ravel(), theirs[:, channel].ravel(), strict=True):
            target = max(other, margin)
            total += 0 if one <= target <= 0 else (one - target) ** 2
    return float(total / len(student))


def flow(one: Array, other: Array) -> Array:
    """Of one image."""
    shallow, deep = (feature[0] for feature in to_smaller_map(one[None], other[None]))
    found = np.zeros((len(shallow), len(deep)))
    for row, column in np.ndindex(shallow.shape[1:]):
        found += np.outer(shallow[:, row, column], deep[:, row, column])
    found /= shallow[0].size
    return found


@joint_golden("fsp")
def golden_fsp(loss: AnyHintLoss, students: Sequence[Array], teachers: Sequence[Array]) -> float:
    ours = []
    for depth, feature in enumerate(students):
        if isinstance(loss.get_submodule(f"regressors.{depth}"), nn.Identity):
            ours.append(feature)
        else:
            weight, bias = (parameter(loss, f"regressors.{depth}.{name}") for name in ("weight", "bias"))
            ours.append(convolved(weight, feature) + bias[:, None, None])
    flows = [(i, i + 1) for i in range(len(students) - 1)] or [(0, 0)]
    return float(
        sum(
            (
                (flow(ours[one][image], ours[other][image]) - flow(teachers[one][image], teachers[other][image])) ** 2
            ).mean()
            for image in range(len(students[0]))
            for one, other in flows
        )
        / len(students[0])
    )


def nearest(feature: Array, height: int, width: int) -> Array:
    rows, columns = (
        [i * size // wanted for i in range(wanted)]
        for size, wanted in zip(feature.shape[2:], (height, width), strict=True)
    )
    return feature[:, :, rows][:, :, :, columns]


@joint_golden("reviewkd")
def golden_reviewkd(loss: AnyHintLoss, students: Sequence[Array], teachers: Sequence[Array]) -> float:
    total, handed_on = 0.0, None
    for depth in reversed(range(len(students))):
        own = standardised(convolved(parameter(loss, f"fusions.{depth}.enter.0.weight"), students[depth]))
        if handed_on is not None:
            deeper = nearest(handed_on, *own.shape[2:])
            weight, bias = (parameter(loss, f"fusions.{depth}.attention.0.{name}") for name in ("weight", "bias"))
            logits = convolved(weight, np.concatenate([own, deeper], axis=1)) + bias[:, None, None]
            attention = 1 / (1 + np.exp(-logits))
            own = own * attention[:, [0]] + deeper * attention[:, [1]]
        handed_on = nearest(own, *teachers[depth].shape[2:])
        output = standardised(convolved(parameter(loss, f"fusions.{depth}.leave.0.weight"), handed_on))
        total += hierarchical(output, teachers[depth])
    return total


@golden("crd")
def golden_crd(loss: AnyHintLoss, student: Array, teacher: Array) -> float:
    assert isinstance(loss, ContrastiveRepresentationDistillation)
    samples = samples_of(len(student))
    with same_draws():
        negatives = loss._negatives(samples.labels).numpy()
    memories = {name: loss.get_buffer(f"{name}_memory").numpy() for name in ("student", "teacher")}
    images, total = len(memories["student"]), 0.0
    anchors = (("student", student, "teacher"), ("teacher", teacher, "student"))
    for way, (name, feature, other) in enumerate(anchors):
        vectors = embedded(loss, name, feature)
        scores = []
        for vector, index, drawn in zip(vectors, samples.indices.tolist(), negatives, strict=True):
            products = memories[other][[index, *drawn]] @ vector / np.linalg.norm(vector)
            scores.append(np.exp(products / 0.07))
        known = float(loss.get_buffer("partitions")[way])
        partition = known or float(np.mean(scores)) * images
        for positive, *others in np.array(scores) / partition:
            noise = len(others) / images
            total -= np.log(positive / (positive + noise + 1e-7))
            total -= sum(np.log(noise / (score + noise + 1e-7)) for score in others)
    return float(total / len(student))
