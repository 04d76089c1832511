"""Distances between the distributions of two vocabularies, over groups of tokens that spell the same text.

ULD (Boizard et al. 2024, arXiv 2402.12030) compares sorted probabilities; GOLD (Patiño et al. 2025, "Unlocking
On-Policy Distillation for Any Model Family") adds a divergence on the tokens that both vocabularies have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.objectives.fused import TokenLoss, final_logits, token_logprobs
from opd.protocols import Dense, Group

if TYPE_CHECKING:
    from jaxtyping import Float

Merge = Literal["bayesian", "observed"]
GroupDistance = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(student's probabilities (G, V), teacher's (G, W)) -> (distance of each group (G,), differentiable; metrics (G,))."""

_FLOOR = 1e-8  # TRL's, of probabilities that are multiplied or whose logarithm is taken


@dataclass(frozen=True)
class VocabularyMatch:
    """The tokens whose string is in both vocabularies: id student_ids[m] is id teacher_ids[m]."""

    student_ids: Tensor  # (M,)
    teacher_ids: Tensor  # (M,)

    @classmethod
    def between(cls, student_tokenizer: Any, teacher_tokenizer: Any) -> VocabularyMatch:
        """By the string as the vocabulary writes it: byte-level Ġa and sentencepiece's ▁a do not match."""
        student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        pairs = sorted((teacher[token], student[token]) for token in teacher.keys() & student.keys())
        teacher_ids, student_ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        return cls(student_ids, teacher_ids)


@dataclass(frozen=True)
class GroupedTokens:
    """Groups with two sides, ascending, over the loss tokens of a micro-batch, and 1 / the groups of their sequence."""

    groups: list[Group]
    weights: list[float]
    num_dropped: int  # pairs with one side

    @classmethod
    def of(cls, alignment: Tensor) -> GroupedTokens:
        """`alignment` (G, 5): the sequence, then its Group."""
        rows: list[list[int]] = alignment.tolist()
        kept = [(owner, (a, b, c, d)) for owner, a, b, c, d in rows if a < b and c < d]
        sizes: dict[int, int] = {}
        for owner, _ in kept:
            sizes[owner] = sizes.get(owner, 0) + 1
        return cls([group for _, group in kept], [1 / sizes[owner] for owner, _ in kept], len(rows) - len(kept))

    @property
    def num_merged(self) -> int:
        """Groups with several tokens on either side."""
        return sum(b - a > 1 or d - c > 1 for a, b, c, d in self.groups)

    def cuts(self, num_tokens: int) -> list[int]:
        """The student's tokens before which no group is torn apart."""
        inside = {token for a, b, _, _ in self.groups for token in range(a + 1, b)}
        return [token for token in range(num_tokens) if token not in inside]

    def token_weights(self, like: Tensor, num_tokens: int) -> Tensor:
        """(num_tokens,): each group's weight at the student's last token of it, 0 elsewhere."""
        last = torch.tensor([b - 1 for _, b, _, _ in self.groups], dtype=torch.long, device=like.device)
        weights = torch.tensor(self.weights, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return weights.new_zeros(num_tokens).index_copy(0, last, weights)


def grouped_loss(
    groups: Sequence[Group],
    distance: GroupDistance,
    *,
    targets: Tensor,
    teacher: Dense,
    teacher_targets: Tensor,
    merge: Merge,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> TokenLoss:
    """The distance of each group's merged distributions, at the student's last token of it; 0 at all other tokens.

    Tokens x_i … x_j merge into one distribution that is not normalised: "bayesian" p_j(·) Π_{q<j} p_q(x_q), the chain
    rule along what was written; "observed" p_i(·) Π_{q>i} p_q(x_q), which TRL computes with the scores at the labels'
    own positions (Needs.label_states), where p_q predicts x_{q+1}. Factors are floored at 1e-8. Gradient flows through
    the student's distribution and through its factors. The tokens of a group must be passed together
    (GroupedTokens.cuts).
    """
    starts = [group[0] for group in groups]

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        mine = groups[bisect_left(starts, rows.start) : bisect_left(starts, rows.stop)]
        base, later, owner = _roles([(a - rows.start, b - rows.start) for a, b, _, _ in mine], merge, logits)
        chosen, own_targets = logits[later] / student_temperature, targets[rows][later]
        logprobs = chosen.gather(1, own_targets[:, None]).squeeze(1) - chosen.logsumexp(1)
        student = _merged(logits[base] / student_temperature, logprobs, owner)
        with torch.no_grad():
            base, later, owner = _roles([(c, d) for _, _, c, d in mine], merge, logits)
            logprobs = token_logprobs(teacher.at(later), teacher_targets[later], temperature=teacher_temperature)
            base_logits = final_logits(teacher.at(base), slice(None)).to(logits.dtype) / teacher_temperature
            theirs = _merged(base_logits, logprobs.to(logits.dtype), owner)
        values, metrics = distance(student, theirs)
        last = torch.tensor([b - 1 - rows.start for _, b, _, _ in mine], dtype=torch.long, device=logits.device)
        empty = logits.new_zeros(len(logits))
        return empty.index_copy(0, last, values), {
            name: empty.index_copy(0, last, column.detach()) for name, column in metrics.items()
        }

    return loss


def sorted_l1(
    student: Float[Tensor, "groups student_vocab"], teacher: Float[Tensor, "groups teacher_vocab"]
) -> Float[Tensor, " groups"]:
    """ULD: Σ_k |k-th largest of the student's - k-th largest of the teacher's|, the shorter padded with zeros.

    At most 2 for probabilities. It knows no token's identity: a permuted vocabulary is at distance 0.
    """
    width = max(student.shape[1], teacher.shape[1])
    ranked = [F.pad(side.sort(1, descending=True).values, (0, width - side.shape[1])) for side in (student, teacher)]
    return (ranked[0] - ranked[1]).abs().sum(1)


def sorted_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`sorted_l1` over the whole vocabularies, as a distance of groups: no token is matched."""
    value = sorted_l1(student, teacher)
    return value, {"unmatched_loss": value}


def hybrid_distance(
    match: VocabularyMatch, *, beta: float, matched_weight: float | None, unmatched_weight: float | None
) -> GroupDistance:
    """w_m · Σ_matched D_β + w_u · `sorted_l1` of the tokens that only one vocabulary has (0 if either has none).

    D_β as in `generalized_jsd`, nats, entry by entry, of probabilities floored at 1e-8 and not normalised again: what
    lies outside the match adds nothing, so it can be negative. Weights None: w_m = matched / the teacher's columns, w_u
    = 1 - w_m. A merged group is matched by the string of one of its tokens: where the student's "2" "5" meet the
    teacher's "25", the student's "5" is compared with the teacher's "5", which it does not mean.
    """

    @cache
    def columns(student_width: int, teacher_width: int, device: torch.device) -> tuple[Tensor, ...]:
        student_ids, teacher_ids = match.student_ids.to(device), match.teacher_ids.to(device)
        scored = (student_ids < student_width) & (teacher_ids < teacher_width)
        student_ids, teacher_ids = student_ids[scored], teacher_ids[scored]
        return student_ids, _others(student_ids, student_width), teacher_ids, _others(teacher_ids, teacher_width)

    def distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        student_ids, student_rest, teacher_ids, teacher_rest = columns(
            student.shape[1], teacher.shape[1], student.device
        )
        matched = _divergence(student.index_select(1, student_ids), teacher.index_select(1, teacher_ids), beta)
        unmatched = torch.zeros_like(matched)
        if len(student_rest) and len(teacher_rest):
            unmatched = sorted_l1(student.index_select(1, student_rest), teacher.index_select(1, teacher_rest))
        if matched_weight is None or unmatched_weight is None:
            share = len(teacher_ids) / teacher.shape[1]
            weights = share, 1 - share
        else:
            weights = matched_weight, unmatched_weight
        value = weights[0] * matched + weights[1] * unmatched
        return value, {"matched_loss": matched, "unmatched_loss": unmatched}

    return distance


def _roles(spans: Sequence[tuple[int, int]], merge: Merge, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of spans [first, end): the token whose distribution is kept, the others, and which span each of these is in."""
    bayesian = merge == "bayesian"
    base = [end - 1 if bayesian else first for first, end in spans]
    others = [token for first, end in spans for token in (range(first, end - 1) if bayesian else range(first + 1, end))]
    owner = [number for number, (first, end) in enumerate(spans) for _ in range(first + 1, end)]
    base, others, owner = (
        torch.tensor(numbers, dtype=torch.long, device=like.device) for numbers in (base, others, owner)
    )
    return base, others, owner


def _merged(base_logits: Tensor, logprobs: Tensor, owner: Tensor) -> Tensor:
    """(G, V): softmax(base_logits) times the probabilities of the group's other tokens."""
    factors = logprobs.exp().clamp(min=_FLOOR).log()
    product = base_logits.new_zeros(len(base_logits)).index_add(0, owner, factors).exp()
    return base_logits.softmax(1) * product[:, None]


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    student, teacher = student.clamp(min=_FLOOR), teacher.clamp(min=_FLOOR)
    if beta == 0:
        return (teacher * (teacher.log() - student.log())).sum(1)
    if beta == 1:
        return (student * (student.log() - teacher.log())).sum(1)
    mixture = (beta * teacher + (1 - beta) * student).log()
    return (beta * teacher * (teacher.log() - mixture) + (1 - beta) * student * (student.log() - mixture)).sum(1)


def _others(ids: Tensor, width: int) -> Tensor:
    """The columns that are none of these."""
    rest = torch.ones(width, dtype=torch.bool, device=ids.device)
    rest[ids] = False
    return rest.nonzero()[:, 0]
