"""What a loss normalization makes of the tokens, their weights, reaches the loss of every method."""

from __future__ import annotations

import pytest
import torch

from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, Layout

TOKENS, VOCAB = 8, 5
METHOD_SETTINGS = {
    "sft": {"loss_on": "assistant"},
    "gkd": {"beta": 0.5, "lmbda": 0.0, "seq_kd": False, "kd_temperature": 1.0},
    "reverse_kl": {
        "kl_coef": 1.0,
        "kl_discount": 0.0,
        "num_substeps": 1,
        "importance_ratio": True,
        "clip_epsilon": None,
        "center_advantages": False,
    },
}


@pytest.mark.parametrize("name", METHOD_SETTINGS)
def test_a_tokens_gradient_is_multiplied_by_its_weight(name):
    generator = torch.Generator().manual_seed(6)
    logits, teacher = torch.randn(2, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    scores = -torch.rand(2, TOKENS, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    ids = torch.cat([torch.zeros(1, dtype=torch.long), targets])[None]
    positions = torch.arange(TOKENS)
    layout = Layout(ids, torch.ones_like(ids), None, positions, targets, torch.zeros_like(positions))
    method = METHODS[name](METHODS[name].Config(name=name, **METHOD_SETTINGS[name]))
    leaf = logits.requires_grad_()

    def grad(weights):
        token_scores = {"student_logprobs": scores[0], "advantages": scores[1]}
        batch = Batch([], layout, token_scores=token_scores, weights=weights)
        terms = method.loss(Dense(leaf, Head(None)), {"teacher": Dense(teacher, Head(None))}, batch).terms
        return torch.autograd.grad(sum(term.weight * term.sum for term in terms), leaf)[0]

    weights = torch.linspace(0, 2, TOKENS).double()
    torch.testing.assert_close(grad(weights), weights[:, None] * grad(None), rtol=1e-10, atol=1e-12)
