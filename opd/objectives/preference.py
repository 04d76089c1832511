"""Preferences: DPO's loss of pairs, and what ADPA reads off two teachers, one before and one after its own DPO.

Log-probabilities, rewards and advantages are in nats. A pair is two sequences next to each other, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.objectives.divergence import divergence_loss, top_k_scores
from opd.objectives.fused import TokenLoss, final_logits, sum_over_tokens
from opd.objectives.policy_gradient import weighted_sum
from opd.protocols import Batch, Dense, Kind, Scores, Sparse, Term, Terms, TokenSequence

if TYPE_CHECKING:
    from jaxtyping import Float

Advantages = Callable[[slice], tuple[Tensor | None, Tensor]]
"""which tokens -> (ids [n, k] or None for all of them, their advantages [n, k]); of other ids it is 0."""

Part = tuple[float, Callable[[Tensor], TokenLoss]]
"""A weight, and what makes the loss of the tokens of these numbers."""


def complete_pairs(sequences: Sequence[TokenSequence]) -> list[bool]:
    """Whether both answers of each pair have loss tokens; one that has none compares nothing."""
    first, second = sequences[::2], sequences[1::2]
    for chosen, other in zip(first, second, strict=True):
        assert chosen.kind == "chosen" and other.kind in ("rejected", "response"), "a pair is (chosen, other)"
        assert (chosen.row, chosen.member) == (other.row, other.member), "a pair is two answers to one prompt"
    return [bool(chosen.num_loss_tokens and other.num_loss_tokens) for chosen, other in zip(first, second, strict=True)]


def pair_logprobs(
    logprobs: Float[Tensor, " tokens"], sequences: Sequence[TokenSequence], *, average: bool = False
) -> Float[Tensor, "pairs 2"]:
    """log π(y|x) of both answers of each complete pair: the sum of the tokens' log-probabilities, or their mean.

    With `average` a β that was chosen for sums is far too small: lengths are of the order of 100.
    """
    complete = complete_pairs(sequences)
    lengths = [sequence.num_loss_tokens for sequence in sequences]
    sums = torch.stack([part.sum() for part in logprobs.split(lengths)]).view(-1, 2)
    if average:
        sums = sums / torch.tensor(lengths, device=sums.device).view(-1, 2).clamp(min=1)
    return sums[torch.tensor(complete, device=sums.device)]


def pair_loss(
    student: Float[Tensor, "pairs 2"],
    reference: Float[Tensor, "pairs 2"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """-(1-ε) log σ(h) - ε log σ(-h), h = β (log π/π_ref of chosen - the same of the other).

    Rafailov et al. 2023 (DPO), eq. 7; ε > 0 is conservative DPO. ∂/∂log π(chosen) = -β σ(-h) for ε = 0.
    """
    rewards = beta * (student - reference.to(student.dtype))
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def reward_metrics(student: Tensor, reference: Tensor, beta: float) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """(sum, number of pairs): accuracy (ties count as wrong), rewards and log-probabilities of both answers."""
    student = student.detach()
    chosen, rejected = (beta * (student - reference.to(student.dtype))).unbind(1)
    columns = {
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "reward_margin": chosen - rejected,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "chosen_logps": student[:, 0],
        "rejected_logps": student[:, 1],
    }
    return {name: (column.sum(), len(column)) for name, column in columns.items()}


def terms_by_pair(
    logprobs: Tensor,
    reference: Tensor,
    sequences: Sequence[TokenSequence],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    average: bool = False,
    weight: float = 1.0,
    kl_penalty_weight: float = 0.0,
) -> Terms:
    """Σ `pair_loss` / "pairs" with `reward_metrics`, and Σ log π_ref - log π of the second answers / "pairs".

    `logprobs` and `reference` are those of the tokens. The second term estimates KL(π_ref ‖ π) of whole answers where
    these were sampled from π_ref. A term of weight 0 is left out, its metrics too.
    """
    student, held = (pair_logprobs(values, sequences, average=average) for values in (logprobs, reference))
    made = Terms([])
    if weight:
        losses = pair_loss(student, held, beta=beta, label_smoothing=label_smoothing)
        made.terms.append(Term(losses.sum(), "pairs", weight))
        made.metrics.update(reward_metrics(student, held, beta))
    if kl_penalty_weight:
        penalty = (held.to(student.dtype) - student)[:, 1]
        made.terms.append(Term(penalty.sum(), "pairs", kl_penalty_weight))
        made.metrics["kl_penalty"] = (penalty.detach().sum(), len(penalty))
    return made


def forward_kl_loss(teacher: Scores, *, top_k: int | None = None, released_quirks: bool = False) -> TokenLoss:
    """KL(teacher ‖ student) of tokens, over the vocabulary or over the teacher's `top_k` likeliest ids and the rest.

    Sparse scores keep the k they were made with. `released_quirks` bounds the student's probabilities from below by
    1e-7 and the teacher's by 1e-8, as ADPA's authors do; an id below the bound then has no gradient. It needs a k
    (ValueError).
    """
    if top_k is not None and isinstance(teacher, Dense):
        teacher = top_k_scores(teacher, top_k)
    if not released_quirks:
        return divergence_loss(teacher, beta=0.0)
    if isinstance(teacher, Dense):
        raise ValueError("the released forward KL compares the k likeliest ids and the rest: top_k is needed")
    sparse = teacher

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        kept = logits.softmax(1).gather(1, sparse.ids[rows])
        student = torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1).clamp(1e-7, 1 - 1e-8)
        buckets = torch.cat([sparse.logprobs[rows], sparse.tail[rows, None]], dim=1)
        target = buckets.to(logits.dtype).exp().clamp(1e-8, 1 - 1e-8)
        return (target * (target.log() - student.log())).sum(1), {}

    return loss


def expected_advantage_loss(
    targets: Tensor,
    dpo_teacher: Scores,
    ref_teacher: Scores,
    *,
    top_k: int | None = None,
    clip: tuple[float, float] | None = None,
    released_quirks: bool = False,
) -> TokenLoss:
    """-Σ_a π(a) A(a) of tokens, A(a) = log p_dpo(a) - log p_ref(a). Gao et al. 2025 (ADPA, arXiv 2502.17927).

    A sum over all next tokens, not an estimate from the sampled one: its gradient is -π_a (A_a - Σ_b π_b A_b).
    `top_k` keeps the DPO teacher's k likeliest ids, with A = 0 elsewhere; two sparse scores must hold the same ids
    (ValueError). `clip` bounds A. Metrics: expected_advantage, and advantage_on_response, A of the target.

    `released_quirks` is what the authors' code computes: A is bounded to [1e-8, 1 - 1e-8], so that what the DPO teacher
    learnt to avoid counts as nothing, and an id outside the reference teacher's own k likeliest is taken for as likely
    there as the DPO teacher's k-th. Its bounds on π, which move the loss by 1e-8 an id, are left out.
    """
    if released_quirks:
        clip = (1e-8, 1 - 1e-8)
        advantages_of = _released_advantages(dpo_teacher, ref_teacher, top_k)
    else:
        advantages_of = _advantages(dpo_teacher, ref_teacher, top_k)

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            ids, advantages = advantages_of(rows)
            advantages = advantages.to(logits.dtype)
            if clip is not None:
                advantages = advantages.clamp(*clip)
        probabilities, sampled = logits.softmax(1), targets[rows, None]
        if ids is None:
            on_response = advantages.gather(1, sampled).squeeze(1)
        else:
            probabilities = probabilities.gather(1, ids)
            on_response = (advantages * (ids == sampled)).sum(1)
        expected = torch.linalg.vecdot(probabilities, advantages)
        return -expected, {"expected_advantage": expected, "advantage_on_response": on_response}

    return loss


def terms_by_kind(student: Dense, batch: Batch, kinds: Mapping[Kind, Mapping[str, Part]], *metrics: str) -> Terms:
    """A term a kind: Σ weight · loss of its tokens / "<kind>_tokens", in one pass over their logits.

    Each part's own loss, unweighted, is a metric under its name; `metrics` names further ones that parts produce. A
    part of weight 0 is not computed.
    """
    made = Terms([])
    for kind, parts in kinds.items():
        tokens = batch.tokens_of(kind)
        losses = {name: (weight, make(tokens)) for name, (weight, make) in parts.items() if weight}
        if losses:
            summed = sum_over_tokens(student.at(tokens), weighted_sum(losses), weights=batch.weights_of(tokens))
            made.terms.append(Term(summed.loss, f"{kind}_tokens"))
            made.metrics.update(summed.means(*losses, *metrics))
    return made


def _advantages(dpo_teacher: Scores, ref_teacher: Scores, top_k: int | None) -> Advantages:
    if isinstance(dpo_teacher, Sparse) and isinstance(ref_teacher, Sparse):
        if not torch.equal(dpo_teacher.ids, ref_teacher.ids):
            raise ValueError("the DPO and the reference teacher's sparse scores must be of the same ids")
        ids, advantages = dpo_teacher.ids, _finite(dpo_teacher.logprobs) - _finite(ref_teacher.logprobs)
        return lambda rows: (ids[rows], advantages[rows])
    dpo, ref = _both_dense(dpo_teacher, ref_teacher)

    def of(rows: slice) -> tuple[Tensor | None, Tensor]:
        dpo_logprobs, ref_logprobs = (_finite(final_logits(one, rows).log_softmax(1)) for one in (dpo, ref))
        if top_k is None:
            return None, dpo_logprobs - ref_logprobs
        kept = dpo_logprobs.topk(min(top_k, dpo_logprobs.shape[1]), dim=1)
        return kept.indices, kept.values - ref_logprobs.gather(1, kept.indices)

    return of


def _released_advantages(dpo_teacher: Scores, ref_teacher: Scores, top_k: int | None) -> Advantages:
    """Both teachers' own k likeliest ids; an id that the reference teacher lacks gets the DPO teacher's k-th."""
    dpo, ref = _both_dense(dpo_teacher, ref_teacher)
    if top_k is None:
        raise ValueError("the released advantages are those of the DPO teacher's k likeliest ids: top_k is needed")

    def of(rows: slice) -> tuple[Tensor | None, Tensor]:
        dpo_probabilities, ref_probabilities = (final_logits(one, rows).softmax(1) for one in (dpo, ref))
        kept = dpo_probabilities.topk(min(top_k, dpo_probabilities.shape[1]), dim=1)
        least_of_ref = ref_probabilities.topk(kept.values.shape[1], dim=1).values[:, -1:]
        ref_kept = ref_probabilities.gather(1, kept.indices)
        ref_kept = torch.where(ref_kept >= least_of_ref, ref_kept, kept.values[:, -1:])
        return kept.indices, kept.values.clamp(min=1e-7).log() - ref_kept.clamp(min=1e-7).log()

    return of


def _both_dense(dpo_teacher: Scores, ref_teacher: Scores) -> tuple[Dense, Dense]:
    if not isinstance(dpo_teacher, Dense) or not isinstance(ref_teacher, Dense):
        raise ValueError("advantages need both teachers' whole distributions, or sparse scores of both on the same ids")
    return dpo_teacher, ref_teacher


def _finite(logprobs: Tensor) -> Tensor:
    """-inf made merely enormous, so that an id which no model allows adds 0 and not NaN."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min / 4)
