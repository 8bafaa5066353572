"""What spawned ranks do in the tests of sharded models."""

from typing import Any

import torch
import torch.distributed as dist
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseSGD, TableConfig
from grzoo.models import AutoModelForRetrieval, ShardedCatalogue
from torch import Tensor


class VectorModel:
    """Items that are their own vectors, with whole-numbered scores, so that ties are exact."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.embeddings = DynamicEmbeddingCollection(
            [TableConfig(name="items", embedding_dim=3, initializer={"kind": "constant", "value": 0.0})],
            [FeatureConfig(name="candidate_ids", table="items")],
            backend="naive",
            process_group=process_group,
        )

    def fill(self, ids: Tensor, vectors: Tensor) -> None:
        self.embeddings.import_rows("items", {"ids": ids, "rows": vectors})

    def item_embeddings(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.embeddings({"candidate_ids": ids}, insert=False)["candidate_ids"]


def catalogue_case(seed: int, *, users: int, items: int, world_size: int = 1) -> dict[str, Tensor]:
    """Small whole numbers as vectors, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10**6, generator=generator)[:items] * 10**12 - 5 * 10**17
    seen = torch.randint(0, 6, (users,), generator=generator)
    picks = torch.randint(0, items + 3, (int(seen.sum()),), generator=generator)
    return {
        "ids": ids,
        "vectors": torch.randint(-2, 3, (items, 3), generator=generator).float(),
        "queries": torch.randint(-2, 3, (users, 3), generator=generator).float(),
        "targets": ids[torch.randint(0, items, (users,), generator=generator)],
        "seen": torch.cat([ids, torch.tensor([1, 2, 3])])[picks],  # some are no candidates
        "starts": torch.nn.functional.pad(seen.cumsum(0), (1, 0)),
        "user_rank": torch.randint(0, max(1, world_size - 1), (users,), generator=generator),  # the last rank has none
    }


def brute_force(case: dict[str, Tensor], user: int, *, keep: int | None = None) -> list[tuple[int, float]]:
    """All (score, id) of a user that are not excluded, best first, by Python's sort."""
    seen = set(case["seen"][case["starts"][user] : case["starts"][user + 1]].tolist()) - {keep}
    scores = (case["vectors"] @ case["queries"][user]).tolist()
    pairs = [(-score, item) for score, item in zip(scores, case["ids"].tolist(), strict=True) if item not in seen]
    return [(item, -score) for score, item in sorted(pairs)]


def expected(case: dict[str, Tensor], user: int, k: int) -> tuple[list[int], list[float], int]:
    """The k best ids and their scores, and the rank of the target."""
    best = brute_force(case, user)[:k]
    best += [(-1, -float("inf"))] * (k - len(best))
    target = case["targets"][user].item()
    rank = 1 + [item for item, _ in brute_force(case, user, keep=target)].index(target)
    return [item for item, _ in best], [score for _, score in best], rank


def sharded_retrieval(rank: int, world_size: int, folder: str, other: str, k: int) -> dict[str, Any]:
    """A catalogue over two and three ranks, and a model that two of them share; one spawn: ranks start slowly."""
    pair = dist.new_group([0, 1])
    three = rank_catalogue(dist.group.WORLD, k)
    if rank == 2:
        return {"3": three}
    return {"3": three, "2": rank_catalogue(pair, k), "model": sharded_model(pair, folder, other)}


def rank_catalogue(group: dist.ProcessGroup, k: int) -> dict[str, Any]:
    """Top-k and ranks of the users of this rank."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    case = catalogue_case(3, users=23, items=40, world_size=world_size)
    model = VectorModel(group)
    model.fill(case["ids"], case["vectors"])
    mine = (case["user_rank"] == rank).nonzero().flatten()
    starts = case["starts"]
    seen = [case["seen"][starts[u] : starts[u + 1]] for u in mine.tolist()]
    exclude = torch.cat([torch.empty(0, dtype=torch.long), *seen]), torch.tensor([0, *map(len, seen)]).cumsum(0)
    catalogue = ShardedCatalogue(model, case["ids"], group)
    whole_table = ShardedCatalogue(model, None, group)
    ids, scores = catalogue.top_k(case["queries"][mine], k, exclude)
    assert torch.equal(ids, whole_table.top_k(case["queries"][mine], k, exclude)[0])
    ranks = catalogue.ranks(case["queries"][mine], case["targets"][mine], exclude)
    result = {"users": mine.tolist(), "ids": ids.tolist(), "scores": scores.tolist(), "ranks": ranks.tolist()}
    result |= {"local": catalogue.ids.numel(), "refused": _refused(catalogue, case["queries"][mine])}
    return result | {"broken": _broken(model, group)}


def _refused(catalogue: ShardedCatalogue, queries: Tensor) -> str:
    """One rank asks for something impossible: all must hear of it."""
    try:
        catalogue.top_k(queries, 10**6 if catalogue.rank == 0 else 1)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _broken(model: VectorModel, group: dist.ProcessGroup) -> str:
    """The vectors of one rank are not finite: all must hear of it."""

    class Diverged:
        embeddings = model.embeddings

        def item_embeddings(self, ids: Tensor) -> Tensor:
            return model.item_embeddings(ids) + (torch.nan if dist.get_rank(group) == 0 else 0.0)

    try:
        ShardedCatalogue(Diverged(), None, group)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def sharded_model(group: dist.ProcessGroup, folder: str, other: str) -> dict[str, Any]:
    """Load a model sharded, recommend to a user of this rank, save it again and load that."""
    model = AutoModelForRetrieval.from_pretrained(folder, process_group=group, embedding_backend="naive")
    history = torch.arange(1, 6).unsqueeze(0) + dist.get_rank(group)
    times = {"timestamps": history * 1000}
    best = model.recommend(history, top_k=4, **times)
    model.save_pretrained(other)
    again = AutoModelForRetrieval.from_pretrained(other, embedding_backend="naive")
    assert torch.equal(best.item_ids, again.recommend(history, top_k=4, **times).item_ids)
    refusal = ""
    try:
        model.push_to_hub("somebody/something")
    except ValueError as error:
        refusal = str(error)
    answer = {"ids": best.item_ids.tolist(), "scores": best.scores.tolist(), "trained": trained_rows(model.train())}
    return answer | {"rows": model.embeddings.num_rows(), "refusal": refusal}


def trained_rows(model: Any) -> int:
    """How many rows of this rank a step moves: those of ids 0 .. 9, by the mean of the ranks' gradients of 1."""
    optimizer = SparseSGD(model.embeddings, lr=0.5)
    before = model.embeddings.export_rows("items")
    model.embeddings({"candidate_ids": torch.arange(10)})["candidate_ids"].sum().backward()
    optimizer.step()
    moved = before["ids"] < 10
    after = model.embeddings.export_rows("items")
    torch.testing.assert_close(after["rows"], before["rows"] - 0.5 * moved[:, None])
    return int(moved.sum())
