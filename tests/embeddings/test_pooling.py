"""Pooled features against nn.EmbeddingBag: S6, S7, S9, S27 and law 1, on each backend of host memory."""

from collections.abc import Callable

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, Jagged, SparseSGD, TableConfig
from grzoo.embeddings.kernels import get_backend
from torch import Tensor, nn

WIDTHS = {"item": 5, "word": 16}
TABLES = [TableConfig(name=n, embedding_dim=d, initializer={"kind": "normal", "std": 1.0}) for n, d in WIDTHS.items()]
FEATURES = [
    FeatureConfig(name="item", table="item"),
    FeatureConfig(name="basket", table="item", pooling="sum"),
    FeatureConfig(name="recent", table="item", pooling="mean"),
    FeatureConfig(name="title", table="word", pooling="mean"),
    FeatureConfig(name="query", table="word", pooling="sum"),
]
NUM_IDS = 12
BACKENDS = ("naive", "host")
VALUES = torch.tensor([3, 3, 7, 0, 3, 9, 9, 1])
OFFSETS = torch.tensor([0, 0, 3, 4, 4, 8, 8])  # empty bags first, inside and last


def build(backend: str = "naive", **options: bool) -> DynamicEmbeddingCollection:
    return DynamicEmbeddingCollection(TABLES, FEATURES, backend=backend, seed=1, **options)


def rows_of(tables: DynamicEmbeddingCollection, feature: str) -> Tensor:
    with torch.no_grad():
        return tables({feature: torch.arange(NUM_IDS)})[feature]


def static_twin(tables: DynamicEmbeddingCollection, mode: str) -> nn.EmbeddingBag:
    """nn.EmbeddingBag over ids 0..11 with the rows of table `item`."""
    return nn.EmbeddingBag.from_pretrained(
        rows_of(tables, "item").clone(), freeze=False, mode=mode, include_last_offset=True
    )


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("feature", "mode"), [("basket", "sum"), ("recent", "mean")])
def test_s6_pooled_rows_and_their_gradients_are_those_of_an_embedding_bag(
    backend: str, feature: str, mode: str
) -> None:
    tables = build(backend)
    twin = static_twin(tables, mode)
    optimizer = SparseSGD(tables, lr=0.5)
    pooled, factor = tables({feature: Jagged(VALUES, OFFSETS)})[feature], randn(6, 5)
    expected = twin(VALUES, OFFSETS)
    torch.testing.assert_close(pooled, expected)
    assert pooled.shape == (6, 5) and pooled[[0, 3, 5]].abs().sum() == 0  # S7
    (pooled.square() * factor).sum().backward()
    (expected.square() * factor).sum().backward()
    optimizer.step()
    torch.testing.assert_close(rows_of(tables, "item"), (twin.weight - 0.5 * twin.weight.grad).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_s6_weights_are_those_of_an_embedding_bag_and_have_its_gradients(backend: str) -> None:
    tables = build(backend)
    twin = static_twin(tables, "sum")
    optimizer = SparseSGD(tables, lr=0.5)
    ours, theirs = randn(8).requires_grad_(), randn(8).requires_grad_()
    pooled = tables({"basket": Jagged(VALUES, OFFSETS, ours)})["basket"]
    expected = twin(VALUES, OFFSETS, per_sample_weights=theirs)
    torch.testing.assert_close(pooled, expected)
    pooled.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    optimizer.step()
    torch.testing.assert_close(rows_of(tables, "item"), (twin.weight - 0.5 * twin.weight.grad).detach())


def test_s4_gradients_of_weights_do_not_need_a_table_that_trains() -> None:
    tables = build()
    rows_of(tables, "item")
    weights = randn(8).requires_grad_()
    tables.eval()({"basket": Jagged(VALUES, OFFSETS, weights)})["basket"].sum().backward()
    torch.testing.assert_close(weights.grad, rows_of(tables, "item")[VALUES].sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 0), (0, 3), (0,), (5,)])
def test_s7_dense_ids_pool_over_the_last_dimension(backend: str, shape: tuple[int, ...]) -> None:
    tables = build(backend)
    optimizer = SparseSGD(tables, lr=1.0)
    ids = torch.arange(torch.Size(shape).numel()).view(shape) % 5
    rows = rows_of(tables, "item")[ids]
    out = tables({"basket": ids, "recent": ids})
    torch.testing.assert_close(out["basket"], rows.sum(-2))
    torch.testing.assert_close(out["recent"], rows.mean(-2) if shape[-1] else rows.sum(-2))
    (out["basket"].sum() + out["recent"].sum()).backward()
    optimizer.step()


def test_unpooled_jagged_ids_give_a_row_each() -> None:
    tables = build().eval()
    look = tables({"item": Jagged(VALUES, OFFSETS)}, insert=True)
    assert torch.equal(look["item"], rows_of(tables, "item")[VALUES])


def test_lengths_and_offsets_of_32_bits_are_the_same_bags() -> None:
    tables = build().eval()
    lengths = OFFSETS.diff()
    expected = tables({"basket": Jagged(VALUES, OFFSETS)}, insert=True)["basket"]
    strided = torch.stack([OFFSETS, OFFSETS], 1)[:, 0], torch.ones(8, 2)[:, 0]
    for jagged in (
        Jagged.from_lengths(VALUES, lengths),
        Jagged(VALUES, OFFSETS.int()),
        Jagged(VALUES, *strided),
    ):
        assert torch.equal(tables({"basket": jagged})["basket"], expected)


def batch() -> dict[str, Tensor | Jagged]:
    words = torch.tensor([[1, 1, 2], [5, 6, 7]])
    weights = torch.tensor([0.5, -2.0, 3.0])
    return {
        "item": torch.tensor([[1], [3]]),
        "recent": Jagged(VALUES, OFFSETS),
        "title": words,
        "query": Jagged(words[0], torch.tensor([0, 2, 3]), weights),
        "basket": words,
    }


def train(tables: DynamicEmbeddingCollection, batches: list[dict[str, Tensor | Jagged]]) -> dict[str, Tensor]:
    optimizer = SparseSGD(tables, lr=0.1)
    for _ in range(2):
        step = tables.prepare(batches).fetch()
        for k in range(len(batches)):
            sum(rows.square().sum() * (i + 1) for i, rows in enumerate(step[k].values())).backward()  # type: ignore[union-attr]
        optimizer.step()
    return {n: tables.export_rows(n)["rows"][tables.ids(n).argsort()] for n in WIDTHS}


def test_s27_one_call_for_features_of_many_widths_whatever_is_merged_and_on_each_backend() -> None:
    expected = train(build(), [batch()])
    for tables in (build(merge=False), build("host")):
        for name, rows in train(tables, [batch()]).items():
            torch.testing.assert_close(rows, expected[name])


def test_s9_law1_bags_of_two_micro_batches_train_as_those_of_one() -> None:
    first = {"basket": Jagged(VALUES[:4], OFFSETS[:4])}
    second = {"basket": Jagged(VALUES[4:], OFFSETS[3:] - 4)}
    whole = {"basket": Jagged(VALUES, OFFSETS)}
    torch.testing.assert_close(train(build(), [first, second])["item"], train(build(), [whole])["item"])  # type: ignore[list-item]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [1, 5, 16, 67])
def test_every_backend_pools_to_the_same_bits(dim: int, threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    naive, host = get_backend("naive"), get_backend("host")
    lengths = torch.tensor([0, 3000, 1, 0, 17, 2000, 0])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n = int(offsets[-1])
    index = torch.randint(40, (n,), generator=torch.Generator().manual_seed(dim))
    for weights in (None, randn(n)):
        values, grads, start = randn(40, dim), randn(7, dim), randn(41, dim)[:40].contiguous()
        pooled = host.pool_rows(values, index, offsets, weights)
        assert torch.equal(pooled, naive.pool_rows(values, index, offsets, weights))
        back = host.unpool_rows(grads, index, offsets, weights, start.clone())
        assert torch.equal(back, naive.unpool_rows(grads, index, offsets, weights, start.clone()))
