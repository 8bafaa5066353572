"""The global cutoff takes the k smallest (score, id): against Python's sort."""

import hypothesis.strategies as st
import pytest
import torch
from grzoo.embeddings.cutoff import select_smallest
from grzoo.embeddings.exchange import Exchange
from hypothesis import given, settings

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_s17_the_lowest_scores_go_and_ties_go_by_id(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([16, 32, 64]))
    ids = data.draw(st.lists(INT64 | st.integers(-5, 5), unique=True, max_size=30))
    scores = [data.draw(st.integers(0, 3) | st.integers(0, 2 ** min(bits, 63) - 1)) for _ in ids]
    k = data.draw(st.integers(0, len(ids)))
    pairs = torch.tensor(scores, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)
    chosen = select_smallest(*pairs, k, Exchange(None), score_bits=bits)
    assert sorted(pairs[1][chosen].tolist()) == sorted(i for _, i in sorted(zip(scores, ids, strict=True))[:k])


def test_repeated_pairs_and_too_large_k_break_an_invariant() -> None:
    same = torch.zeros(2, dtype=torch.int64)
    for k in (1, 3):
        with pytest.raises(AssertionError):
            select_smallest(same, same, k, Exchange(None))
