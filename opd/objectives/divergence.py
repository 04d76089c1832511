"""Divergences between the student's and the teacher's next-token distributions, per token, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    token_clip: float | None = None,
    top_k: int | None = None,
) -> tuple[Float[Tensor, " tokens"], dict[str, Float[Tensor, " tokens"]]]:
    """D_β(T, S) a token, with forward_kl, reverse_kl and the student's entropy as constants beside it.

    D_β = β KL(T ‖ M) + (1-β) KL(S ‖ M), M = β T + (1-β) S, for 0 < β < 1; β = 0 is KL(T ‖ S), β = 1 is KL(S ‖ T).
    Agarwal et al. 2024 (GKD), eq. 2. The jump at the ends is theirs: D_β → 0 as β → 0 or 1, and D_β / β → KL(T ‖ S).
    Both logits are divided by `temperature`; there is no factor τ². The mixture is formed in log space, so logits
    of ±50 stay finite; a logit of -inf on both sides adds nothing. Gradient flows to the student only.

    `top_k` compares the teacher's k likeliest ids alone, both distributions renormalised to them. `token_clip` bounds
    from above what each id of the vocabulary adds to the sum; an id at its bound has no gradient of its own, so the
    clipped sum may be negative. "clip_fraction" then says at which tokens some id was bounded. The other metrics are
    over the whole vocabulary all the same.
    """
    teacher_logits = teacher_logits.detach()
    if token_clip is None and top_k is None:
        value, *compared = _GeneralizedJSD.apply(student_logits, teacher_logits, float(beta), float(temperature))
        return value, dict(zip(_COMPARED, compared, strict=True))
    metrics = _compare(student_logits, teacher_logits, temperature)
    if top_k is not None:
        ids = teacher_logits.topk(min(top_k, teacher_logits.shape[1]), dim=1).indices
        student_logits, teacher_logits = student_logits.gather(1, ids), teacher_logits.gather(1, ids)
    if token_clip is None:
        value = _GeneralizedJSD.apply(student_logits, teacher_logits, float(beta), float(temperature))[0]
        return value, metrics
    terms = _jsd_terms(student_logits / temperature, teacher_logits / temperature, beta)
    is_clipped = (terms.detach() > token_clip).any(1)
    return terms.clamp(max=token_clip).sum(1), {**metrics, "clip_fraction": is_clipped.to(terms.dtype)}


def divergence_loss(
    teacher: Scores,
    *,
    beta: float,
    temperature: float = 1.0,
    token_clip: float | None = None,
    top_k: int | None = None,
    agreement: bool = False,
) -> TokenLoss:
    """`generalized_jsd` against a teacher's scores, as a loss of tokens.

    Sparse scores compare k+1 buckets: the teacher's k ids and, as one, all the rest. That is a lower bound of the
    divergence over the vocabulary (data processing), equal to it for k = V. They hold probabilities at temperature 1.

    `agreement` adds the metric "teacher_student_agreement": whether both find the same id likeliest. It, `token_clip`
    and `top_k` are for dense scores only (ValueError).
    """
    if isinstance(teacher, Dense):
        dense = teacher

        def dense_loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            against = final_logits(dense, rows).to(logits.dtype)
            value, metrics = generalized_jsd(
                logits, against, beta=beta, temperature=temperature, token_clip=token_clip, top_k=top_k
            )
            return value, {**metrics, **_agreement(logits, against)} if agreement else metrics

        return dense_loss
    if token_clip is not None or top_k is not None or agreement:
        raise ValueError("token_clip, top_k and agreement are read off whole distributions, not off sparse scores")
    if temperature != 1.0:
        raise ValueError(f"sparse teacher scores hold probabilities at temperature 1, not {temperature}")
    sparse = teacher

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        student = _bucket_logprobs(logits, sparse.ids[rows])
        buckets = torch.cat([sparse.logprobs[rows], sparse.tail[rows, None]], dim=1).to(student.dtype)
        return generalized_jsd(student, buckets, beta=beta)

    return loss


def sampled_token_loss(teacher: Dense, targets: Tensor, *, temperature: float = 1.0) -> TokenLoss:
    """-A log S(y) with the constant A = log T(y) - log S(y), for tokens y that the student sampled.

    In expectation over y its gradient is that of KL(S ‖ T), at `temperature` if y was sampled at it; its value says
    nothing. Metrics are those of the whole distributions, and "teacher_student_agreement".
    """

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        against, chosen = final_logits(teacher, rows).to(logits.dtype), targets[rows, None]
        student_logprobs = (logits / temperature).log_softmax(1).gather(1, chosen).squeeze(1)
        teacher_logprobs = (against / temperature).log_softmax(1).gather(1, chosen).squeeze(1)
        advantages = (teacher_logprobs - student_logprobs).detach()
        return -advantages * student_logprobs, {
            **_compare(logits, against, temperature),
            **_agreement(logits, against),
        }

    return loss


def top_k_scores(teacher: Dense, k: int) -> Sparse:
    """The k likeliest ids of each token, their log-probabilities, and the log of the remaining mass."""
    return _sparse(teacher, lambda logits, rows: logits.topk(min(k, logits.shape[1]), dim=1).indices)


def scores_on(teacher: Dense, ids: Tensor) -> Sparse:
    """The same of given ids, (N, k): two teachers can only be compared on the same ones."""
    return _sparse(teacher, lambda logits, rows: ids[rows])


def _sparse(teacher: Dense, choose: Callable[[Tensor, slice], Tensor]) -> Sparse:
    parts = []
    for rows in tiles(teacher):
        logits = final_logits(teacher, rows)
        ids = choose(logits, rows)
        buckets = _bucket_logprobs(logits, ids)
        parts.append((ids, buckets[:, :-1], buckets[:, -1]))
    ids, logprobs, tail = (torch.cat(column) for column in zip(*parts, strict=True))
    return Sparse(ids, logprobs, tail)


def _bucket_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(n, k+1): log-probabilities of the ids and of everything else. The rest is summed, never 1 minus the others.

    The ids are made merely enormous, not -inf: a sum of nothing but -inf has NaN for a gradient.
    """
    normalizer = logits.logsumexp(1, keepdim=True)
    rest = logits.scatter(1, ids, torch.finfo(logits.dtype).min / 4)
    empty = torch.full_like(normalizer, -math.inf)
    tail = empty if ids.shape[1] >= logits.shape[1] else rest.logsumexp(1, keepdim=True) - normalizer
    return torch.cat([logits.gather(1, ids) - normalizer, tail], dim=1)


def _jsd_terms(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """(tokens, vocabulary): what each id adds to D_β. -inf is made merely enormous, as in `_distribution`."""
    smallest = torch.finfo(student_logits.dtype).min / 4
    student = student_logits.log_softmax(1).clamp(min=smallest)
    teacher = teacher_logits.log_softmax(1).clamp(min=smallest)
    if beta == 0:
        return teacher.exp() * (teacher - student)
    if beta == 1:
        return student.exp() * (student - teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


_COMPARED = ("forward_kl", "reverse_kl", "entropy")


def _compare(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """The metrics of `generalized_jsd` alone."""
    with torch.no_grad():
        _, *compared = _GeneralizedJSD.apply(student_logits, teacher_logits, 0.0, float(temperature))
    return dict(zip(_COMPARED, compared, strict=True))


def _agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    same = student_logits.argmax(1) == teacher_logits.argmax(1)
    return {"teacher_student_agreement": same.to(student_logits.dtype)}


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
