"""Law 1 on real engines: an optimizer step is a function of its global batch, and of nothing else.

A micro HSTU with dropout and sampled negatives trains 20 steps. The reference is a plain torch loop over the same
global batches: one process, one micro-batch, no DeepSpeed, no exchange.
"""

import functools

import pytest
import torch
from engine_jobs import Layout, Recipe, Result, plain_loop
from engine_runs import ADAMW, RUNS, result_of

pytestmark = pytest.mark.timeout(600)  # the first test waits for all ranks
TOLERANCE = 1e-5
FP32 = [(r, layout) for runs in RUNS.values() for r, layout in runs if layout.dtype == "fp32"]
BF16 = [(r, layout) for runs in RUNS.values() for r, layout in runs if layout.dtype == "bf16"]


@functools.cache
def reference(name: str) -> Result:
    recipe = next(recipe for recipe, _ in FP32 if recipe.dense[0] == name)
    return plain_loop(recipe)


def describe(value: object) -> str:
    if isinstance(value, Recipe):
        return f"{value.dense[0]}-{value.sparse[0]}-{value.negatives}"
    assert isinstance(value, Layout)
    return f"ranks{value.world_size}-zero{value.stage}-micro{value.micro_batches}-{value.dtype}-{value.repeat}"


@pytest.mark.parametrize(("recipe", "layout"), FP32, ids=describe)
def test_layout_does_not_change_the_result(recipe: Recipe, layout: Layout) -> None:
    found, expected = result_of(recipe, layout), reference(recipe.dense[0])
    for series in ("losses", "grad_norms", "sparse_grad_norms"):
        ours, theirs = getattr(found, series), getattr(expected, series)
        assert len(ours) == len(theirs) == recipe.steps
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=TOLERANCE, atol=TOLERANCE)
    assert found.losses[-1] < 0.85 * found.losses[0], "nothing was learnt"
    for ours, theirs in ((found.rows, expected.rows), (found.dense, expected.dense)):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 2)], ids=describe)
def test_same_seed_same_bits(layout: Layout) -> None:
    first = result_of(ADAMW, layout)
    again = result_of(ADAMW, Layout(layout.world_size, layout.stage, layout.micro_batches, repeat=1))
    assert first.losses == again.losses and first.grad_norms == again.grad_norms
    assert all(torch.equal(row, again.rows[item]) for item, row in first.rows.items())
    assert all(torch.equal(value, again.dense[name]) for name, value in first.dense.items())


@pytest.mark.parametrize(("recipe", "layout"), BF16, ids=describe)
def test_bf16_agrees_within_its_precision(recipe: Recipe, layout: Layout) -> None:
    found, expected = result_of(recipe, layout), reference(recipe.dense[0])
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0.02, atol=0.02)
    assert found.losses != expected.losses, "bf16 did nothing"
    assert found.rows.keys() == expected.rows.keys()


def test_other_seed_other_result() -> None:
    """The comparison above would see a difference: dropout and negatives follow the seed."""
    other = plain_loop(Recipe(seed=8, steps=2))
    assert abs(other.losses[0] - reference("AdamW").losses[0]) > 10 * TOLERANCE
