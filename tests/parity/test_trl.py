"""Values and gradients equal those of TRL 1.16, of GKDTrainer and of DistillationTrainer."""

from __future__ import annotations

import os

import pytest
import torch

from opd.objectives import divergence_loss, generalized_jsd, sum_over_tokens
from opd.protocols import Dense, Head

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # before the fixtures import it
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TEMPERATURES = [0.7, 1.0, 2.0]
TOKENS, VOCAB = 40, 31


@pytest.fixture(scope="module")
def trl_jsd():
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@pytest.fixture(scope="module")
def trl_fused():
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss


@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_that_of_trls_gkd(trl_jsd, beta, temperature, scale):
    """In float64, to 1e-9."""
    generator = torch.Generator().manual_seed(21)
    student, teacher = scale * torch.randn(2, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    leaf = student.requires_grad_()
    value, _ = generalized_jsd(leaf, teacher, beta=beta, temperature=temperature)
    expected = trl_jsd(leaf, teacher, beta=beta, temperature=temperature, reduction="none").sum(-1)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), leaf),
        torch.autograd.grad(expected.sum(), leaf),
        rtol=1e-9,
        atol=1e-11,
    )


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale and softcap": {"scale": 0.5, "softcap": 5.0},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_the_fused_loss_is_that_of_trls_distillation(trl_fused, beta, temperature, head):
    """In float32, which is what TRL computes in: gradients to 1e-4 and 1e-6, loss to 1e-5."""
    generator = torch.Generator().manual_seed(22)
    settings = dict(HEADS[head])
    has_bias = settings.pop("bias", False)

    def model(width):
        hidden = torch.randn(TOKENS, width, generator=generator)
        weight = torch.randn(VOCAB, width, generator=generator)
        bias = torch.randn(VOCAB, generator=generator) if has_bias else None
        return hidden, weight, bias

    student, teacher = model(8), model(12)
    leaves = [tensor.requires_grad_() for tensor in student if tensor is not None]
    mask = torch.arange(TOKENS) % 5 != 0
    expected, entropy, tokens = trl_fused(
        student[0][None],
        teacher[0][None],
        student[1],
        teacher[1],
        mask[None],
        beta,
        student_lm_head_bias=student[2],
        teacher_lm_head_bias=teacher[2],
        student_logit_scale=settings.get("scale", 1.0),
        teacher_logit_scale=settings.get("scale", 1.0),
        student_final_logit_softcapping=settings.get("softcap"),
        teacher_final_logit_softcapping=settings.get("softcap"),
        temperature=temperature,
    )
    summed = sum_over_tokens(
        Dense(student[0][mask], Head(*student[1:], **settings)),
        divergence_loss(Dense(teacher[0][mask], Head(*teacher[1:], **settings)), beta=beta, temperature=temperature),
    )
    loss = summed.loss / int(tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-6
    )
    if temperature == 1.0:
        torch.testing.assert_close(summed.metrics["entropy"].sum(), entropy, rtol=1e-5, atol=1e-5)
