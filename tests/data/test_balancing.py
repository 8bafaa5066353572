"""Law 1 and the budget: a partition only moves samples between bins, and is the same on every rank."""

import math
import tracemalloc
from itertools import product

import numpy as np
import pytest
from grzoo.data import bin_costs, partition, plan_micro_batches
from grzoo.data.balancing import _exchange, longest_first, step_cost, try_partition
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 4096), max_size=60)


def quadratic(tokens: np.ndarray) -> np.ndarray:
    return tokens * 640.0 + tokens.astype(float) ** 2


@given(LENGTHS, st.integers(1, 9))
def test_every_sample_is_in_one_bin(lengths: list[int], bins: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    chosen = partition(quadratic(tokens), tokens, bins)
    assert chosen.shape == tokens.shape and ((chosen >= 0) & (chosen < bins)).all()
    assert np.array_equal(chosen, partition(quadratic(tokens), tokens, bins))
    assert np.isclose(bin_costs(quadratic(tokens), chosen, bins).sum(), quadratic(tokens).sum())


@given(LENGTHS, st.integers(1, 9), st.integers(4096, 20_000))
def test_the_budget_is_kept(lengths: list[int], bins: int, budget: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    chosen = try_partition(quadratic(tokens), tokens, bins, budget)
    if chosen is None:
        # Greedy may give up early, but never where half-full bins suffice.
        assert 2 * tokens.sum() > bins * budget
    else:
        assert np.bincount(chosen, weights=tokens, minlength=bins).max() <= budget


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(1.0, 1.3))
def test_a_tight_budget_is_kept_whatever_the_costs(seed: int, bins: int, slack: float) -> None:
    generator = np.random.default_rng(seed)
    tokens, cost = generator.integers(1, 50, 60), generator.random(60)
    budget = max(50, math.ceil(slack * tokens.sum() / bins))
    chosen = try_partition(cost, tokens, bins, budget)
    if chosen is None:
        assert slack < 1.05, "best fit needs little room"
    else:
        assert np.bincount(chosen, weights=tokens, minlength=bins).max() <= budget


def test_longest_first_gives_each_sample_to_the_cheapest_bin() -> None:
    assert longest_first(np.array([3.0, 7, 5, 4, 6]), 2).tolist() == [0, 0, 1, 0, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
def test_largest_cost_is_within_four_thirds_of_the_optimum(lengths: list[int], bins: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    cost = tokens.astype(float)
    best = min(bin_costs(cost, np.array(place), bins).max() for place in product(range(bins), repeat=len(tokens)))
    assert bin_costs(cost, partition(cost, tokens, bins), bins).max() <= best * 4 / 3 + 1e-9


def test_refinement_finds_the_exchange_that_greedy_misses() -> None:
    cost = np.array([3.0, 3, 2, 2, 2])  # longest first gives 7 and 5
    assert bin_costs(cost, partition(cost, cost.astype(int), 2), 2).tolist() == [6, 6]


@given(LENGTHS, st.integers(1, 6), st.one_of(st.none(), st.integers(4096, 9000)), st.one_of(st.none(), st.just(40)))
def test_plans_have_equal_counts_and_keep_the_budget(
    lengths: list[int], world: int, budget: int | None, fixed: int | None
) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    plan = plan_micro_batches(quadratic(tokens), tokens, world, budget, fixed)
    members = [plan.members(k, r) for k in range(plan.num_micro_batches) for r in range(world)]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(tokens)))
    assert all((np.diff(part) > 0).all() for part in members), "members keep the order of the global batch"
    assert fixed is None or plan.num_micro_batches == fixed
    assert budget is None or all(tokens[part].sum() <= budget for part in members)
    again = plan_micro_batches(quadratic(tokens), tokens, world, budget, fixed)
    assert np.array_equal(plan.micro_batch, again.micro_batch) and np.array_equal(plan.rank, again.rank)


def test_the_number_of_micro_batches_is_the_least_that_fits() -> None:
    tokens = np.full(16, 100)
    for budget, number in ((1600, 1), (800, 1), (799, 2), (400, 2), (300, 3), (100, 8)):
        assert plan_micro_batches(tokens, tokens, 2, budget).num_micro_batches == number
    assert plan_micro_batches([], [], 3, 100).num_micro_batches == 1


@pytest.mark.parametrize(("world", "bound"), [(8, 1.001), (128, 1.001)])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_no_rank_waits_on_long_tailed_lengths(world: int, bound: float, micro_batches: int) -> None:
    tokens = np.clip(np.random.default_rng(world).lognormal(5.6, 1.25, world * 32), 1, 4096).astype(np.int64)
    cost = quadratic(tokens)
    plan = plan_micro_batches(cost, tokens, world, None, micro_batches)
    assert step_cost(cost, plan, world) / (cost.sum() / world) < bound


def test_one_sample_larger_than_all_others_together_is_the_bound() -> None:
    cost = np.array([100.0] + [1.0] * 20)
    for number in (1, 2, 4):
        plan = plan_micro_batches(cost, cost.astype(int), 4, None, number)
        assert step_cost(cost, plan, 4) <= 105


def test_without_a_budget_the_bound_is_met_however_long_the_longest() -> None:
    tokens = np.array([2000] + [300] * 20 + [40] * 400)
    cost = quadratic(tokens)
    for number in (1, 2, 4):
        plan = plan_micro_batches(cost, tokens, 8, None, number)
        assert step_cost(cost, plan, 8) / max(cost.max(), cost.sum() / 8) < 1.001


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(2, 40))
def test_an_exchange_is_the_best_of_all_pairs(seed: int, first: int, second: int) -> None:
    cost = np.random.default_rng(seed).random(first + second)
    bins = np.repeat([0, 1], [first, second])
    loads, tokens = bin_costs(cost, bins, 2), np.ones(len(cost), dtype=np.int64)
    high, before = int(loads.argmax()), float(loads.max())
    give, take = cost[bins == high], np.append(cost[bins != high], 0.0)
    moved = give[:, None] - take
    best = np.maximum(loads[high] - moved, loads[1 - high] + moved).min()
    exchanged = _exchange(cost, tokens, bins, loads, np.array([first, second]), high, 1 - high, None)
    after = float(bin_costs(cost, bins, 2).max())
    assert np.isclose(after, min(best, before)) and exchanged == (after < before)


def test_large_bins_are_refined_in_little_memory() -> None:
    tokens = np.random.default_rng(0).integers(1, 4096, 20_000)
    tracemalloc.start()
    plan = plan_micro_batches(quadratic(tokens), tokens, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert step_cost(quadratic(tokens), plan, 2) / (quadratic(tokens).sum() / 2) < 1.0001 and peak < 50e6


def test_step_cost_sums_the_slowest_rank_of_each_micro_batch() -> None:
    cost = np.array([5.0, 4, 3, 2])
    plan = plan_micro_batches(cost, [1, 1, 1, 1], 2, 1, 2)
    loads = [[cost[plan.members(k, r)].sum() for r in range(2)] for k in range(2)]
    assert step_cost(cost, plan, 2) == sum(max(pair) for pair in loads) == 8


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sequence of 9 tokens exceeds the budget of 8"):
        partition([1.0, 2.0], [9, 1], 4, 8)
    with pytest.raises(ValueError, match="10 tokens do not fit into 1 bins of 8"):
        partition([1.0, 2.0], [5, 5], 1, 8)
    with pytest.raises(ValueError, match="do not fit into 1 ranks x 1 micro-batches of 8 tokens"):
        plan_micro_batches([1.0, 2.0], [5, 5], 1, 8, 1)
    with pytest.raises(ValueError, match="finite"):
        partition([np.nan], [1], 1)
    with pytest.raises(ValueError, match="2 costs for 1 token counts"):
        partition([1.0, 2.0], [1], 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_micro_batches([1.0], [1], 0)
