"""S1: the value of an untouched row is a pure function of (seed, init_key, id, column), and is its definition."""

import math

import pytest
import torch
from grzoo.embeddings.keyed import keyed, string_key
from grzoo.embeddings.policies import initial_rows, quantile_table, row_init
from scipy import stats

MASK = 2**64 - 1
IDS = [0, -1, 7, 2**63 - 1, -(2**63)]


def bits(seed: int, key: str, i: int, column: int) -> int:
    return int(keyed(seed, string_key(key), i, column)) & MASK


def test_s1_uniform_is_its_definition_bit_for_bit() -> None:
    rows = initial_rows(row_init({"kind": "uniform", "scale": 0.05}, 5, "item"), torch.tensor(IDS), 3)
    factor = torch.tensor(0.05 * 2.0**-23, dtype=torch.float32)
    expected = [[factor * float((bits(5, "item", i, c) >> 40) - 2**23) for c in range(3)] for i in IDS]
    assert torch.equal(rows, torch.tensor(expected, dtype=torch.float32))
    assert rows.abs().max() <= 0.05


@pytest.mark.parametrize("kind", ["normal", "truncated_normal"])
def test_s1_normal_laws_are_a_fixed_quantile_table(kind: str) -> None:
    law = stats.norm() if kind == "normal" else stats.truncnorm(-2, 2)
    points = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    torch.testing.assert_close(
        quantile_table(kind).double(), torch.from_numpy(law.ppf(points.numpy())), rtol=1e-6, atol=1e-7
    )
    rows = initial_rows(row_init({"kind": kind, "std": 0.02}, 5, "item"), torch.tensor(IDS), 3)
    std = torch.tensor(0.02, dtype=torch.float32)
    expected = [[std * quantile_table(kind)[bits(5, "item", i, c) >> 48] for c in range(3)] for i in IDS]
    assert torch.equal(rows, torch.tensor(expected))


def test_s1_moments() -> None:
    ids = torch.arange(20_000)
    for spec, std in [
        ({"kind": "uniform", "scale": 0.3}, 0.3 / math.sqrt(3)),
        ({"kind": "normal", "std": 0.3}, 0.3),
        ({"kind": "truncated_normal", "std": 0.3}, 0.3 * stats.truncnorm(-2, 2).std()),
    ]:
        rows = initial_rows(row_init(spec, 0, "item"), ids, 8)
        assert rows.mean().item() == pytest.approx(0, abs=0.005)
        assert rows.std().item() == pytest.approx(std, rel=0.01)
        assert torch.corrcoef(rows.T).fill_diagonal_(0).abs().max() < 0.04
    assert initial_rows(row_init({"kind": "constant", "value": -2.5}, 0, "x"), ids[:2], 2).tolist() == [[-2.5] * 2] * 2


def test_s1_each_part_of_the_key_matters_and_width_does_not() -> None:
    spec = {"kind": "uniform", "scale": 1.0}
    base = initial_rows(row_init(spec, 0, "item"), torch.tensor(IDS), 4)
    assert not torch.equal(base, initial_rows(row_init(spec, 1, "item"), torch.tensor(IDS), 4))
    assert not torch.equal(base, initial_rows(row_init(spec, 0, "user"), torch.tensor(IDS), 4))
    assert torch.equal(base[:, :2], initial_rows(row_init(spec, 0, "item"), torch.tensor(IDS), 2))
    assert base.unique().numel() == base.numel()
    assert initial_rows(row_init(spec, 0, "item"), torch.empty(0, dtype=torch.int64), 4).shape == (0, 4)


def test_s1_ambient_dtype_and_device_do_not_matter() -> None:
    """zero.Init and transformers build models under other defaults."""
    spec = {"kind": "normal", "std": 0.02}
    ids = torch.tensor(IDS)
    expected = initial_rows(row_init(spec, 0, "item"), ids, 4)
    quantile_table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rows = initial_rows(row_init(spec, 0, "item"), ids, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rows, expected)
