"""Divergences between the student's and the teacher's next-token distributions, per token, in nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd.objectives.fused import TokenLoss, final_logits, tiles
from opd.protocols import Dense, Scores, Sparse

if TYPE_CHECKING:
    from jaxtyping import Float


def generalized_jsd(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    *,
    beta: float,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " tokens"], dict[str, Float[Tensor, " tokens"]]]:
    """D_β(T, S) a token, with forward_kl, reverse_kl and the student's entropy as constants beside it.

    D_β = β KL(T ‖ M) + (1-β) KL(S ‖ M), M = β T + (1-β) S, for 0 < β < 1; β = 0 is KL(T ‖ S), β = 1 is KL(S ‖ T).
    Agarwal et al. 2024 (GKD), eq. 2. The jump at the ends is theirs: D_β → 0 as β → 0 or 1, and D_β / β → KL(T ‖ S).
    Both logits are divided by `temperature`; there is no factor τ². The mixture is formed in log space, so logits
    of ±50 stay finite; a logit of -inf on both sides adds nothing. Gradient flows to the student only.
    """
    outputs = _GeneralizedJSD.apply(student_logits, teacher_logits.detach(), float(beta), float(temperature))
    value, forward_kl, reverse_kl, entropy = outputs
    return value, {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "entropy": entropy}


def divergence_loss(teacher: Scores, *, beta: float, temperature: float = 1.0) -> TokenLoss:
    """`generalized_jsd` against a teacher's scores, as a loss of tokens.

    Sparse scores compare k+1 buckets: the teacher's k ids and, as one, all the rest. That is a lower bound of the
    divergence over the vocabulary (data processing), equal to it for k = V. They hold probabilities at temperature 1.
    """
    if isinstance(teacher, Dense):
        dense = teacher
        return lambda logits, rows: generalized_jsd(
            logits, final_logits(dense, rows).to(logits.dtype), beta=beta, temperature=temperature
        )
    if temperature != 1.0:
        raise ValueError(f"sparse teacher scores hold probabilities at temperature 1, not {temperature}")
    sparse = teacher

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        student = _bucket_logprobs(logits, sparse.ids[rows])
        buckets = torch.cat([sparse.logprobs[rows], sparse.tail[rows, None]], dim=1).to(student.dtype)
        return generalized_jsd(student, buckets, beta=beta)

    return loss


def top_k_scores(teacher: Dense, k: int) -> Sparse:
    """The k likeliest ids of each token, their log-probabilities, and the log of the remaining mass."""
    ids, logprobs, tails = [], [], []
    for rows in tiles(teacher):
        logits = final_logits(teacher, rows)
        top = logits.topk(min(k, logits.shape[1]), dim=1).indices
        buckets = _bucket_logprobs(logits, top)
        ids.append(top)
        logprobs.append(buckets[:, :-1])
        tails.append(buckets[:, -1])
    return Sparse(torch.cat(ids), torch.cat(logprobs), torch.cat(tails))


def _bucket_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(n, k+1): log-probabilities of the ids and of everything else. The rest is summed, never 1 minus the others.

    The ids are made merely enormous, not -inf: a sum of nothing but -inf has NaN for a gradient.
    """
    normalizer = logits.logsumexp(1, keepdim=True)
    rest = logits.scatter(1, ids, torch.finfo(logits.dtype).min / 4)
    empty = torch.full_like(normalizer, -math.inf)
    tail = empty if ids.shape[1] >= logits.shape[1] else rest.logsumexp(1, keepdim=True) - normalizer
    return torch.cat([logits.gather(1, ids) - normalizer, tail], dim=1)


class _GeneralizedJSD(torch.autograd.Function):
    """Closed-form gradient: ∂D/∂z_v = s_v (g_v - Σ_u s_u g_u) / τ with g = (1-β) log(s/m), or log(s/t) at β = 1."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, beta: float, temperature: float):
        student, student_logprobs = _distribution(student_logits, temperature)
        teacher, teacher_logprobs = _distribution(teacher_logits, temperature)
        log_ratio = teacher_logprobs - student_logprobs
        forward_kl, reverse_kl = _dot(teacher, log_ratio), -_dot(student, log_ratio)
        entropy = -_dot(student, student_logprobs)
        if beta == 0:
            value, grad = forward_kl, student - teacher
        elif beta == 1:
            value, grad = reverse_kl, student * log_ratio.add_(reverse_kl[:, None]).neg_()
        else:
            # log(m/s) = log((1-β) + β t/s), taken from the larger side so that nothing overflows.
            mixture = torch.logaddexp(teacher_logprobs + math.log(beta), student_logprobs + math.log1p(-beta))
            student_gap = student_logprobs.sub_(mixture)
            student_term = _dot(student, student_gap)
            value = beta * _dot(teacher, teacher_logprobs.sub_(mixture)) + (1 - beta) * student_term
            grad = student_gap.sub_(student_term[:, None]).mul_(student).mul_(1 - beta)
        if temperature != 1.0:
            grad = grad / temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(forward_kl, reverse_kl, entropy)
        return (value.clone() if beta in (0, 1) else value), forward_kl, reverse_kl, entropy

    @staticmethod
    def backward(ctx, grad_value, *_):
        (grad,) = ctx.saved_tensors
        return grad * grad_value[:, None], None, None, None


def _distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms. -inf is made merely enormous, so that 0 · log 0 is 0 and not NaN.

    The normaliser is read off the largest probability: softmax is three times as fast as log_softmax on a CPU.
    """
    logits = logits if temperature == 1.0 else logits / temperature
    probabilities = logits.softmax(1)
    normalizer = logits.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log()
    logprobs = logits - normalizer
    return probabilities, logprobs.clamp_(min=torch.finfo(logprobs.dtype).min / 4)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner product, without the [tokens, vocabulary] product in between."""
    return torch.linalg.vecdot(left, right)
