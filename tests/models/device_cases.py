"""Every model on a device equals the same in host memory. Run by test_device.py under Triton's interpreter.

The simulated device (tests/embeddings/simulated_device.py) refuses what a GPU would, and counts the waits of the host.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import SparseSGD
from grzoo.models import (
    DLRMConfig,
    DLRMForRanking,
    DLRMHSTUConfig,
    DLRMHSTUForRanking,
    HSTUConfig,
    HSTUForRetrieval,
    MTGRConfig,
    MTGRForRanking,
    SASRecConfig,
    SASRecForRetrieval,
)
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "embeddings"))
from simulated_device import DEVICE, SimulatedDevice, put_on_device, simulated_device  # noqa: E402

RETRIEVAL = dict(
    hidden_size=6, num_attention_heads=2, num_hidden_layers=1, max_sequence_length=20, initializer_range=0.5
)
HSTU = RETRIEVAL | dict(attention_head_dim=3, linear_head_dim=4, hidden_dropout=0.2)
SASREC = RETRIEVAL | dict(hidden_dropout=0.2)
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "hstu uniform": (HSTUForRetrieval, HSTUConfig, HSTU | dict(negative_sampling="uniform", num_negatives=3)),
    "hstu shared": (HSTUForRetrieval, HSTUConfig, HSTU | dict(negative_sampling="shared", num_negatives=3)),
    "hstu all": (HSTUForRetrieval, HSTUConfig, HSTU | dict(negative_sampling="all", num_negatives=19)),
    "sasrec bce": (SASRecForRetrieval, SASRecConfig, SASREC | dict(num_negatives=3)),
    "sasrec softmax": (
        SASRecForRetrieval,
        SASRecConfig,
        SASREC | dict(loss="softmax", negative_sampling="all", num_negatives=19),
    ),
    "dlrm": (DLRMForRanking, DLRMConfig, {}),
    "dlrm-hstu": (DLRMHSTUForRanking, DLRMHSTUConfig, {}),
    "mtgr": (MTGRForRanking, MTGRConfig, {}),
}
# Waits of the host in the forward pass of a micro-batch: starts of sequences, checks of times, trained places, ...
WAITS = {
    "hstu uniform": 4,
    "hstu shared": 4,
    "hstu all": 5,
    "sasrec bce": 2,
    "sasrec softmax": 3,
    "dlrm": 8,
    "dlrm-hstu": 8,
    "mtgr": 9,
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    with simulated_device(monkeypatch) as found:
        yield found


def build(name: str, ranking: Any, placement: str, dtype: torch.dtype) -> Any:
    model_class, config_class, fields = MODELS[name]
    fields = fields or ranking.fields | ({} if name == "dlrm" else {"num_hidden_layers": 1})
    torch.manual_seed(0)
    config = config_class(**fields)
    names = [table.name for table in config.embedding_tables()]
    config = config_class(**fields, table_policies={table: {"placement": placement} for table in names})
    return model_class(config, embedding_backend="naive").to(dtype).train()


def micro_batches(name: str, batches: Any, ranking: Any) -> tuple[list[dict[str, Any]], Any]:
    """Two micro-batches, one with an empty user, and the denominators of their loss."""
    if not MODELS[name][2]:
        return [ranking.make_ranking_batch([3, 0, 2], [2, 1, 1]), ranking.make_ranking_batch([1], [2], seed=1)], [4, 5]
    sampling = MODELS[name][2].get("negative_sampling", "uniform")
    return [batches.make_batch([3, 0, 2], sampling=sampling), batches.make_batch([1], sampling=sampling, seed=3)], 5


def to_device(tree: Any) -> Any:
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, tree)


def train_step(model: Any, parts: list[dict[str, Any]], denominator: Any) -> dict[str, torch.Tensor]:
    """Loss, gradients of the parameters, and rows after a step, by name, in host memory."""
    optimizer = SparseSGD(model.embeddings, lr=0.1)
    where = next(model.parameters()).device
    step = model.embeddings.prepare([model.embedding_ids(part) for part in parts]).fetch(where)
    found: dict[str, torch.Tensor] = {"loss": torch.zeros(())}
    for k, part in enumerate(parts):
        loss = model(**part, embeddings=step[k], num_items_in_batch=denominator).loss
        loss.backward()
        found["loss"] = found["loss"] + loss.detach().cpu()
    optimizer.step()
    found |= {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: model.embeddings.export_rows(name)["rows"] for name in model.embeddings.table_names}


@pytest.mark.parametrize("name", MODELS)
def test_law1_a_model_trains_on_a_device_as_in_host_memory(
    device: SimulatedDevice, batches: Any, ranking: Any, name: str
) -> None:
    parts, denominator = micro_batches(name, batches, ranking)
    expected = train_step(build(name, ranking, "host", torch.float32), parts, denominator)
    model = put_on_device(build(name, ranking, "device", torch.float32))
    found = train_step(model, to_device(parts), denominator)
    assert found.keys() == expected.keys() and found["loss"] > 0
    for part, want in expected.items():
        torch.testing.assert_close(found[part], want, atol=2e-5, rtol=1e-4, msg=lambda m, at=part: f"{at}: {m}")


@pytest.mark.parametrize("name", ["hstu uniform", "sasrec softmax", "dlrm", "mtgr"])
def test_a_model_in_bfloat16_on_a_device_trains_tables_in_host_memory(
    device: SimulatedDevice, batches: Any, ranking: Any, name: str
) -> None:
    parts, denominator = micro_batches(name, batches, ranking)
    expected = train_step(build(name, ranking, "host", torch.float32), parts, denominator)
    found = train_step(put_on_device(build(name, ranking, "host", torch.bfloat16)), to_device(parts), denominator)
    assert found.keys() == expected.keys() and all(values.isfinite().all() for values in found.values())
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_host_waits_for_in_a_micro_batch(
    device: SimulatedDevice, batches: Any, ranking: Any, name: str
) -> None:
    """Nothing in the backward pass."""
    parts, denominator = micro_batches(name, batches, ranking)
    parts = to_device(parts)
    model = put_on_device(build(name, ranking, "device", torch.float32))
    optimizer = SparseSGD(model.embeddings, lr=0.1)
    step = model.embeddings.prepare([model.embedding_ids(part) for part in parts]).fetch()
    model(**parts[0], embeddings=step[0], num_items_in_batch=denominator)  # what is made once
    device.waits.clear()
    loss = model(**parts[1], embeddings=step[1], num_items_in_batch=denominator).loss
    in_forward = device.waits.total()
    loss.backward()
    assert in_forward == WAITS[name] and device.waits.total() == in_forward, dict(device.waits)
    del optimizer


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["hstu uniform", "sasrec bce"])
def test_recommendations_are_made_where_the_model_is(
    device: SimulatedDevice, batches: Any, ranking: Any, name: str, padded: bool
) -> None:
    """Wherever the candidates are: all rows of the table, a list, a tensor."""
    batch = batches.make_batch([3, 2])
    history = batches.pad(batch, left=True) if padded else batch
    names = ("input_ids", "attention_mask", "cu_seq_lens_q", *(("timestamps",) if "hstu" in name else ()))
    history = {field: history[field] for field in names if field in history}
    for candidates in (None, [3, 10**17, -4, 5], torch.tensor([3, 10**17, -4, 5])):
        results = []
        for where in ("host", "device"):
            model = build(name, ranking, "host", torch.float32)
            optimizer = SparseSGD(model.embeddings, lr=0.1)
            model.embeddings({"input_ids": torch.arange(-7, 12) * 10**17})
            model = put_on_device(model) if where == "device" else model
            given = to_device(history) if where == "device" else history
            best = model.recommend(**given, top_k=3, candidates=candidates)
            assert best.item_ids.device == best.scores.device == given["input_ids"].device
            results.append((best.item_ids.cpu(), best.scores.cpu()))
            del optimizer
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dlrm", "dlrm-hstu", "mtgr"])
def test_ranking_models_score_on_a_device(device: SimulatedDevice, batches: Any, ranking: Any, name: str) -> None:
    parts, _ = micro_batches(name, batches, ranking)
    scores = []
    for where in ("host", "device"):
        model = build(name, ranking, "host", torch.float32).eval()
        model = put_on_device(model) if where == "device" else model
        padded = ranking.pad_ranking(ranking.take_ranking_users(parts[0], [0, 2]), left=True)
        with torch.no_grad():
            scores.append(model(**(to_device(padded) if where == "device" else padded)).logits.cpu())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-4)
