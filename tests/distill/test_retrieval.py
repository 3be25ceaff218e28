from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill import retrieval as module
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.retrieval import RetrievalScores, embeddings, retrieval, retrieval_scores
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.functional.retrieval import retrieval_average_precision

DISTANCES = ("cosine", "l2")
AT = (1, 3, 100)


@dataclass(frozen=True)
class Case:
    """Vectors and labels of a database, then of queries."""

    database: Tensor
    database_labels: Tensor
    queries: Tensor
    query_labels: Tensor

    def scores(self, distance: str, at: tuple[int, ...] = AT, memory: int = 2**30) -> RetrievalScores:
        return retrieval_scores(
            self.database, self.database_labels, self.queries, self.query_labels, distance, at, memory
        )


def random_case(items: int, queries: int, classes: int, seed: int = 0, width: int = 5) -> Case:
    generator = torch.Generator().manual_seed(seed)
    labels, asked = (torch.randint(0, classes, (count,), generator=generator) for count in (items, queries))
    centres = torch.randn(classes, width, generator=generator)
    database, vectors = (centres[of] + torch.randn(len(of), width, generator=generator) for of in (labels, asked))
    return Case(database, labels, vectors, asked)


def on_a_line(relevant: list[bool]) -> Case:
    """One query, and a database whose items lie further away from it one after another, by both distances."""
    angles = torch.linspace(0.1, 1.5, len(relevant))
    database = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor(relevant).long()
    shuffled = torch.randperm(len(relevant), generator=torch.Generator().manual_seed(0))
    return Case(database[shuffled], labels[shuffled], torch.tensor([[1.0, 0.0]]), torch.tensor([1]))


def distance_between(query: Any, item: Any, distance: str) -> float:
    if distance == "l2":
        return float(sum((q - i) ** 2 for q, i in zip(query, item, strict=True)))
    norms = np.sqrt(sum(q * q for q in query)) * np.sqrt(sum(i * i for i in item))
    return 1.0 if norms == 0 else float(1 - sum(q * i for q, i in zip(query, item, strict=True)) / norms)


def by_definition(case: Case, distance: str, at: tuple[int, ...] = AT) -> RetrievalScores:
    """Each query's ranking walked through from its first item to its last."""
    database, queries = case.database.double().numpy(), case.queries.double().numpy()
    labels = case.database_labels.tolist()
    exact, interpolated, precision = [], [], {k: [] for k in at}
    for query, label in zip(queries, case.query_labels.tolist(), strict=True):
        if label not in labels:
            continue
        apart = [distance_between(query, item, distance) for item in database]
        ranking = [labels[i] == label for i in sorted(range(len(database)), key=lambda i: (apart[i], i))]
        found, walk = 0, []
        for rank, relevant in enumerate(ranking, start=1):
            found += relevant
            walk.append((found, found / rank, relevant))
        exact.append(sum(share for _, share, relevant in walk if relevant) / found)
        levels = [max(share for so_far, share, _ in walk if 10 * so_far >= level * found) for level in range(11)]
        interpolated.append(sum(levels) / 11)
        for k in at:
            precision[k].append(sum(ranking[:k]) / len(ranking[:k]))
    return RetrievalScores(
        float(np.mean(exact)), float(np.mean(interpolated)), {k: float(np.mean(each)) for k, each in precision.items()}
    )


def assert_same(found: RetrievalScores, expected: RetrievalScores, rel: float = 1e-4) -> None:
    """By default up to two neighbours in a ranking that float32 cannot tell apart."""
    assert found.mean_average_precision == pytest.approx(expected.mean_average_precision, rel=rel)
    assert found.interpolated == pytest.approx(expected.interpolated, rel=rel)
    assert found.precision == pytest.approx(expected.precision, rel=rel)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("items", "queries", "classes"), [(1, 1, 1), (7, 5, 2), (60, 40, 3), (90, 150, 20)])
def test_scores_are_those_of_the_definition(items: int, queries: int, classes: int, distance: str) -> None:
    case = random_case(items, queries, classes)
    assert_same(case.scores(distance), by_definition(case, distance))


@st.composite
def cases_with_ties(draw: st.DrawFn, exact: st.SearchStrategy[list[int]]) -> Case:
    items, queries, classes = draw(st.integers(1, 25)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    label = st.integers(0, classes - 1)
    # The first query's class is in the database.
    labels = draw(st.lists(label, min_size=items, max_size=items))
    asked = [labels[0], *draw(st.lists(label, min_size=queries - 1, max_size=queries - 1))]
    vectors, questions = (draw(st.lists(exact, min_size=count, max_size=count)) for count in (items, queries))
    return Case(
        torch.tensor(vectors).float(), torch.tensor(labels), torch.tensor(questions).float(), torch.tensor(asked)
    )


# Their squared distances are exact in float32; so, of length 0, 1 or 2, are the cosines of the others.
INTEGERS = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
UNIT_OR_SIGNS = st.one_of(
    st.sampled_from([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0]]),
    st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4),
)


@given(case=cases_with_ties(INTEGERS))
@settings(deadline=None, max_examples=60)
def test_ties_of_l2_keep_the_order_of_the_database(case: Case) -> None:
    assert_same(case.scores("l2"), by_definition(case, "l2"), rel=1e-12)


@given(case=cases_with_ties(UNIT_OR_SIGNS))
@settings(deadline=None, max_examples=60)
def test_ties_of_cosine_keep_the_order_of_the_database(case: Case) -> None:
    assert_same(case.scores("cosine"), by_definition(case, "cosine"), rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_exact_average_precision_is_that_of_torchmetrics(distance: str) -> None:
    case = random_case(80, 25, 4, seed=3)
    # Positive, for torchmetrics takes nothing else for relevant.
    if distance == "l2":
        nearness = 1 / (1 + torch.cdist(case.queries, case.database))
    else:
        nearness = 2 + nn.functional.cosine_similarity(case.queries[:, None], case.database[None], dim=2)
    expected = [
        retrieval_average_precision(near, case.database_labels == label).item()
        for near, label in zip(nearness, case.query_labels, strict=True)
    ]
    assert case.scores(distance).mean_average_precision == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_perfect_ranking_scores_one(distance: str) -> None:
    found = on_a_line([True] * 7 + [False] * 20).scores(distance, at=(1, 7))
    assert found == RetrievalScores(1.0, 1.0, {1: 1.0, 7: 1.0})


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("rank", [1, 2, 7, 30])
def test_one_relevant_item_at_a_rank_scores_its_reciprocal(rank: int, distance: str) -> None:
    found = on_a_line([place == rank for place in range(1, 31)]).scores(distance)
    assert found.mean_average_precision == pytest.approx(1 / rank)
    assert found.interpolated == pytest.approx(1 / rank)


def test_interpolated_precision_is_the_best_at_any_recall_not_less() -> None:
    # Relevant at ranks 2, 3 and 5: precisions 1/2, 2/3, 3/5. Recall 2/3 serves the levels 0 to .6, recall 1 the rest.
    found = on_a_line([False, True, True, False, True, False]).scores("l2")
    assert found.mean_average_precision == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert found.interpolated == pytest.approx((7 * 2 / 3 + 4 * 3 / 5) / 11)


def test_recall_that_equals_a_level_serves_it() -> None:
    # Ten relevant items, the first nine at once: recall .9 has precision 1, recall 1 has 10/20.
    found = on_a_line([True] * 9 + [False] * 10 + [True]).scores("l2")
    assert found.interpolated == pytest.approx((10 + 0.5) / 11)


def test_precision_at_k_is_of_the_first_k_or_of_all() -> None:
    case = on_a_line([True, False, True, True, False])
    found = case.scores("l2", at=(1, 2, 3, 5, 8))
    assert found.precision == pytest.approx({1: 1, 2: 1 / 2, 3: 2 / 3, 5: 3 / 5, 8: 3 / 5})


@pytest.mark.parametrize("distance", DISTANCES)
def test_memory_does_not_change_the_scores(distance: str) -> None:
    case = random_case(70, 400, 3, seed=1)
    assert_same(case.scores(distance, memory=1), case.scores(distance))


@pytest.mark.parametrize(("memory", "most"), [(1, 1), (10_000, 7), (2**30, 64)])
def test_memory_bounds_the_queries_that_are_ranked_at_once(
    memory: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[int] = []
    ranks = module._relevant_ranks

    def noted(distances: Tensor, *others: Any) -> Tensor:
        ranked.append(len(distances))
        return ranks(distances, *others)

    monkeypatch.setattr(module, "_relevant_ranks", noted)
    case = Case(torch.rand(25, 2), torch.zeros(25).long(), torch.rand(100, 2), torch.zeros(100).long())
    case.scores("l2", memory=memory)
    assert sum(ranked) == 100
    assert max(ranked) == most


def test_rows_are_sorted_by_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(50, 70, 2)
    alone = case.scores("l2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert case.scores("l2") == alone


@pytest.mark.parametrize("distance", DISTANCES)
def test_queries_of_a_class_that_the_database_has_not_are_left_out(distance: str) -> None:
    case = random_case(40, 20, 3)
    others = Case(
        case.database,
        case.database_labels,
        torch.cat([case.queries[:9], torch.randn(5, 5), case.queries[9:]]),
        torch.cat([case.query_labels[:9], torch.tensor([-1, 3, 7, 3, 99]), case.query_labels[9:]]),
    )
    assert_same(others.scores(distance), case.scores(distance))


def test_queries_of_no_class_of_the_database_are_refused() -> None:
    case = Case(torch.rand(3, 2), torch.tensor([0, 1, 1]), torch.rand(2, 2), torch.tensor([2, 3]))
    with pytest.raises(InputError) as error:
        case.scores("l2")
    assert str(error.value) == "no query is of a class that the database has; let both hold the same classes"


@pytest.mark.parametrize("distance", DISTANCES)
def test_classes_of_the_database_without_a_query_are_ranked_all_the_same(distance: str) -> None:
    case = random_case(40, 20, 3)
    few = Case(case.database, case.database_labels, case.queries, torch.full((20,), 2))
    assert_same(few.scores(distance), by_definition(few, distance))


def test_zero_vectors_are_as_far_as_orthogonal_ones_by_cosine() -> None:
    database = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    case = Case(database, torch.tensor([0, 1, 0, 0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1]))
    # The first query finds it at rank 2, in front of what is as far; the second finds all equally far.
    assert case.scores("cosine").mean_average_precision == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize("distance", DISTANCES)
def test_every_vector_is_nearest_to_itself(distance: str) -> None:
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 3
    own = torch.arange(200)
    assert Case(vectors, own, vectors, own).scores(distance, at=(1,)) == RetrievalScores(1.0, 1.0, {1: 1.0})


@pytest.mark.parametrize("below", [-1e-7, -0.0])
def test_distance_just_below_zero_by_rounding_counts_as_zero(below: float) -> None:
    distances, relevant = torch.tensor([[0.0, below, 0.5]]), torch.tensor([True, False, True])
    with ThreadPoolExecutor(1) as pool:
        assert module._relevant_ranks(distances, relevant, pool).tolist() == [[0, 2]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("where", ["database", "queries"])
def test_vectors_without_distances_are_refused(value: float, where: str) -> None:
    case = random_case(10, 10, 2)
    getattr(case, where)[4, 2] = value
    with pytest.raises(InputError, match=r"^an embedding is not finite, or too long to square; "):
        case.scores("cosine")


def test_unknown_distance_is_refused() -> None:
    with pytest.raises(InputError, match=r"^distance is 'cosin'; did you mean 'cosine'\? \(cosine, l2\)$"):
        random_case(3, 3, 1).scores("cosin")


def test_precision_at_no_items_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^at holds 0, but a precision is that of the first k items; choose k from 1$"
    ):
        random_case(3, 3, 1).scores("l2", at=(5, 0))


class ConvolutionHead(nn.Module):
    """Ends with a 1×1 convolution and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.conv(x))).mean(dim=(2, 3))
        return logits


class TokenHead(nn.Module):
    """Classifies each column of pixels as a token, given by name, then averages."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(input=x[:, 0].transpose(1, 2)).mean(dim=1)
        return logits


class FailsInTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc(x[:, 0, 0])
        raise RuntimeError("in the end")


class Splits(FailsInTheEnd):
    """Gives its classifier two rows for each image."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x[:, 0, :2].flatten(0, 1)).unflatten(0, (-1, 2)).mean(dim=1)
        return logits


class Ignores(FailsInTheEnd):
    """Does not run its classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


@pytest.fixture
def data(splits: DataSplits) -> DeviceImages:
    return DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))


def all_images(data: DeviceImages) -> Tensor:
    return torch.cat([batch.images for batch in data.in_order(16)])


@pytest.mark.parametrize("batch_size", [7, 59, 100])
def test_embeddings_are_what_the_classifier_takes(
    plain_network: Callable[..., nn.Sequential], data: DeviceImages, batch_size: int
) -> None:
    model = plain_network()
    features, labels = embeddings(model, "fc", data, batch_size, Execution())
    torch.testing.assert_close(features, model[:-1](all_images(data)).detach())
    assert torch.equal(labels, data.labels)


def test_maps_that_a_convolution_takes_are_averaged(data: DeviceImages) -> None:
    model = ConvolutionHead()
    features, _ = embeddings(model, "head", data, 16, Execution())
    torch.testing.assert_close(features, torch.relu(model.conv(all_images(data))).mean(dim=(2, 3)).detach())


def test_tokens_that_a_linear_layer_takes_are_averaged(data: DeviceImages) -> None:
    features, _ = embeddings(TokenHead(), "head", data, 16, Execution())
    torch.testing.assert_close(features, all_images(data)[:, 0].mean(dim=2))


def test_embeddings_are_ordinary_tensors_without_gradient(teacher: nn.Module, data: DeviceImages) -> None:
    features, labels = embeddings(teacher, "fc", data, 16, Execution())
    assert not features.requires_grad
    assert not features.is_inference()
    assert not labels.is_inference()


def test_embeddings_of_bf16_are_float32(teacher: nn.Module, data: DeviceImages) -> None:
    exact, _ = embeddings(teacher, "fc", data, 16, Execution())
    rounded, _ = embeddings(teacher, "fc", data, 16, Execution(precision="bf16"))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_embeddings_are_made_in_eval_mode_and_modes_restored(teacher: nn.Module, data: DeviceImages) -> None:
    expected, _ = embeddings(teacher.eval(), "fc", data, 16, Execution())
    teacher.train().get_submodule("bn1").eval()
    modes = [part.training for part in teacher.modules()]
    found, _ = embeddings(teacher, "fc", data, 16, Execution())
    assert torch.equal(found, expected)
    assert [part.training for part in teacher.modules()] == modes


def test_an_error_leaves_neither_hook_nor_eval_mode(data: DeviceImages) -> None:
    model = FailsInTheEnd().train()
    with pytest.raises(RuntimeError, match="in the end"):
        embeddings(model, "fc", data, 16, Execution())
    assert not model.fc._forward_pre_hooks
    assert model.training


@pytest.mark.parametrize(("model", "rows"), [(Splits(), "32"), (Ignores(), "no")])
def test_classifier_that_takes_no_feature_of_each_image_is_refused(
    model: nn.Module, rows: str, data: DeviceImages
) -> None:
    with pytest.raises(InputError) as error:
        embeddings(model, "fc", data, 16, Execution())
    assert str(error.value) == (
        f"the classifier 'fc' is given {rows} features for 16 images; let it run once for all of them"
    )


def test_retrieval_gives_the_scores_of_both_distances(splits: DataSplits, teacher: nn.Module) -> None:
    database, queries = (
        DeviceImages(split, splits.preprocessing, torch.device("cpu")) for split in (splits.train, splits.validation)
    )
    case = Case(
        *embeddings(teacher, "fc", database, 16, Execution()), *embeddings(teacher, "fc", queries, 16, Execution())
    )
    found = retrieval(teacher, "fc", database, queries, 16, Execution(), at=(5, 100))
    expected: dict[str, float] = {}
    for distance in DISTANCES:
        scores = by_definition(case, distance, at=(5, 100))
        expected |= {
            f"map_{distance}": scores.mean_average_precision,
            f"map11_{distance}": scores.interpolated,
            f"precision_at_5_{distance}": scores.precision[5],
            f"precision_at_100_{distance}": scores.precision[100],
        }
    assert found == pytest.approx(expected, rel=1e-4)
