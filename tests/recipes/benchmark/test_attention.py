"""Lengths of the attention benchmark: of the public log where it is, else drawn to its percentiles; cut, not empty."""

import pytest
import torch
from grzoo.models.ops.host import available
from grzoo.recipes.benchmark.attention import main
from grzoo.recipes.benchmark.attention_device import operations
from grzoo.recipes.benchmark.attention_masked import masked_workload
from grzoo.recipes.benchmark.attention_workloads import ml1m_lengths, zipf_lengths


@pytest.mark.parametrize("has_log", [True, False])
def test_lengths_of_ml1m_come_from_the_log_or_its_percentiles(has_log, tmp_path, monkeypatch):
    monkeypatch.setenv("GRZOO_DATA", str(tmp_path))
    if has_log:
        (tmp_path / "ml-1m").mkdir()
        lines = [f"{user} {item}" for user in range(1, 41) for item in range(user + 1)]
        (tmp_path / "ml-1m" / "ml-1m.txt").write_text("\n".join(lines))
    lengths, source = ml1m_lengths(16, 20)
    assert len(lengths) == 16 and min(lengths) >= 1 and max(lengths) == 20
    assert ("ml-1m.txt" in source) == has_log


def test_zipf_lengths_are_long_and_cut():
    lengths, _ = zipf_lengths(64, 512)
    assert len(lengths) == 64 and min(lengths) >= 64 and max(lengths) <= 512


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_contestants_of_the_masked_workload_compute_the_same():
    workload = masked_workload([30, 0, 7], "test", rounds=1)
    steps = workload.steps()
    host, grouped = (steps[name]() for name in ("host", "grouped"))
    padded = [
        torch.cat([x[user, :, :n].transpose(0, 1) for user, n in enumerate(workload.lengths)])
        for x in steps["padded_eager"]()
    ]
    for a, b, c in zip(host, grouped, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


def test_operations_count_five_and_two_products():
    assert operations([3]) == 2 * 4 * 6 * 128 * 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_benchmark_refuses():
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["--device", "cuda"])
