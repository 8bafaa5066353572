"""Law 5: binary cross-entropy over sampled negatives equals its naive twin, forward and every gradient."""

import pytest
import torch
from grzoo.models.ops import sampled_bce_loss, sampled_bce_loss_naive


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens, negatives, unique", [(0, 4, 3), (1, 1, 2), (40, 6, 9), (3, 2, 100)])
def test_equals_naive(tokens, negatives, unique, normalize):
    torch.manual_seed(0)
    query = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(unique, 5, dtype=torch.float64, requires_grad=True)
    positive, negative = torch.randint(0, unique, (tokens,)), torch.randint(0, unique, (tokens, negatives))
    call = (query, rows, positive, negative, negative == positive.unsqueeze(1))
    options = dict(temperature=0.5, positive_power=0.3, normalize=normalize)
    results = []
    for function in (sampled_bce_loss_naive, sampled_bce_loss):
        loss = function(*call, **options)
        results.append([loss, *torch.autograd.grad(loss, (query, rows))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_torchs_own_loss_for_one_negative():
    """The loss of SASRec's paper: BCE of the positive against 1 and of one negative against 0."""
    torch.manual_seed(1)
    query, rows = torch.randn(8, 4), torch.randn(20, 4)
    positive, negative = torch.arange(8), torch.arange(8, 16)
    logits = torch.stack([(query * rows[positive]).sum(1), (query * rows[negative]).sum(1)])
    targets = torch.tensor([[1.0], [0.0]]).expand(2, 8)
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    accidental = torch.zeros(8, 1, dtype=torch.bool)
    got = sampled_bce_loss(query, rows, positive, negative.unsqueeze(1), accidental)
    torch.testing.assert_close(got, want)


def test_large_scores_stay_finite():
    query = torch.tensor([[1e4]], requires_grad=True)
    rows, index = torch.tensor([[-1.0], [1.0]]), torch.tensor([0])
    loss = sampled_bce_loss(query, rows, index, torch.tensor([[1]]), torch.tensor([[False]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and query.grad.isfinite().all()
