"""The likelihood of targets against torch's own cross-entropy."""

from __future__ import annotations

import math

import torch

from opd.objectives import negative_log_likelihood, sum_over_tokens
from opd.protocols import Dense, Head

LOGITS = torch.randn(30, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
TARGETS = torch.randint(9, (30,), generator=torch.Generator().manual_seed(5))
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def summed(logits):
    return sum_over_tokens(Dense(logits, Head(None)), negative_log_likelihood(TARGETS))


def test_value_and_gradient_are_those_of_cross_entropy():
    leaf = LOGITS.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, TARGETS, reduction="none")
    actual = summed(leaf)
    torch.testing.assert_close(actual.values, expected.detach(), **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, leaf), torch.autograd.grad(expected.sum(), leaf), **TOLERANCE
    )


def test_the_metrics_are_whether_the_target_is_the_likeliest_and_the_entropy():
    metrics = summed(LOGITS).metrics
    hits = (LOGITS.argmax(1) == TARGETS).double()
    assert 0 < hits.sum() < 30
    assert torch.equal(metrics["mean_token_accuracy"], hits)
    entropy = torch.distributions.Categorical(logits=LOGITS).entropy()
    torch.testing.assert_close(metrics["entropy"], entropy, **TOLERANCE)


def test_an_impossible_token_leaves_everything_finite():
    wide = torch.cat([LOGITS, torch.full((30, 1), -math.inf).double()], dim=1).requires_grad_()
    actual, expected = summed(wide), summed(LOGITS)
    torch.testing.assert_close(actual.values, expected.values, **TOLERANCE)
    torch.testing.assert_close(actual.metrics, expected.metrics, **TOLERANCE)
    (grad,) = torch.autograd.grad(actual.loss, wide)
    assert torch.isfinite(grad).all()
    assert (grad[:, -1] == 0).all()
