"""Law 1: the mask is a function of (token, site, column); law 5: the fast one equals the naive one bit for bit."""

import pytest
import torch
from grzoo.models.ops import keyed_dropout, keyed_dropout_naive
from grzoo.models.ops.keyed_dropout import eager

KEYS = torch.randint(-(2**63), 2**63 - 1, (301,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (301, 7), (300, 64)])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.999])
def test_equals_naive(shape, p, monkeypatch):
    monkeypatch.setattr(eager, "_CHUNK", 100)
    x = torch.randn(shape, requires_grad=True)
    results = []
    for function in (keyed_dropout_naive, keyed_dropout, eager.keyed_dropout_eager):
        out = function(x, p, KEYS[: shape[0]], 3)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for want, *others in zip(*results, strict=True):
        for got in others:
            assert torch.equal(want == 0, got == 0)
            torch.testing.assert_close(got, want)


def test_mask_belongs_to_the_token():
    x = torch.ones(301, 16)
    whole = keyed_dropout(x, 0.3, KEYS, 1)
    order = torch.randperm(301)
    assert torch.equal(keyed_dropout(x, 0.3, KEYS[order], 1), whole[order])
    assert torch.equal(keyed_dropout(x[:9], 0.3, KEYS[:9], 1), whole[:9])
    assert not torch.equal(keyed_dropout(x, 0.3, KEYS, 2), whole)
    assert torch.equal(keyed_dropout(x[:, :5], 0.3, KEYS, 1), whole[:, :5])


def test_share_of_zeros_by_site_and_column():
    kept = torch.stack([keyed_dropout(torch.ones(301, 64), 0.2, KEYS, site) for site in range(8)]) > 0
    total = kept.float().mean()
    assert abs(total - 0.8) < 4 * (0.2 * 0.8 / kept.numel()) ** 0.5
    both = (kept[:-1] & kept[1:]).float().mean()  # neighbouring sites are independent
    assert abs(both - 0.64) < 4 * (0.64 * 0.36 / kept[1:].numel()) ** 0.5


def test_expectation_is_kept_and_dtype_too():
    out = keyed_dropout(torch.ones(301, 64, dtype=torch.bfloat16), 0.5, KEYS, 0)
    assert out.dtype == torch.bfloat16 and set(out.unique().tolist()) == {0.0, 2.0}
