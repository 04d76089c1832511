"""Advantages from log-probability differences, and the policy-gradient loss that uses them. Per token, in nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd.objectives.fused import TokenLoss

if TYPE_CHECKING:
    from jaxtyping import Float


def discounted_future_sum(values: Float[Tensor, "*batch time"], discount: float) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + γ y_{t+1} along the last axis, nothing after its end. γ = 0 returns the values themselves."""
    if discount == 0:
        return values.clone()
    result = values.clone()
    for step in range(values.shape[-1] - 2, -1, -1):
        result[..., step] += discount * result[..., step + 1]
    return result


def reverse_kl_advantages(
    student_logprobs: Float[Tensor, "*batch time"],
    teacher_logprobs: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    *,
    kl_coef: float,
    kl_discount: float,
) -> Float[Tensor, "*batch time"]:
    """A_t = Σ_k γ^k x_{t+k}, x = -kl_coef · mask · (log π_student - log π_teacher), then masked again.

    The sum runs over the whole row, masked slots counting 0 but taking up time. Not length-normalised, no bootstrap
    where a rollout is truncated. Tinker cookbook, incorporate_kl_penalty.
    """
    penalty = -kl_coef * (student_logprobs - teacher_logprobs) * loss_mask
    return discounted_future_sum(penalty, kl_discount) * loss_mask


def center_advantages(
    advantages: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Float[Tensor, "*batch time"]:
    """Advantages minus their mean over all loss tokens; `total` adds a tensor up over all ranks."""
    return (advantages - mean_and_std(advantages, loss_mask, total)[0]) * loss_mask


def mean_and_std(
    values: Tensor, loss_mask: Tensor, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[float, float]:
    """Mean and standard deviation (of the population) over the loss tokens of all ranks; 0 and 0 for none."""
    wide = (values * loss_mask).double()
    sums = total(torch.stack([wide.sum(), wide.square().sum(), loss_mask.sum().double()]))
    count = max(float(sums[2]), 1.0)
    mean = float(sums[0]) / count
    return mean, max(float(sums[1]) / count - mean**2, 0.0) ** 0.5


def pad_rows(rows: Sequence[Tensor]) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Rows of different lengths as one right-padded tensor, and its mask (1 where a row has a value)."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).to(padded.dtype)


def policy_gradient_loss(
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None,
    clip_epsilon: float | None = None,
) -> TokenLoss:
    """-ρ A with ρ = π_θ / π_old (`old_logprobs` given), else -A log π_θ; advantages and π_old are constants.

    Both have the same gradient where π_old = π_θ, but other values. `clip_epsilon`: PPO's pessimistic clip of ρ.
    Metrics: ratio, its clip indicator, the student's entropy.
    """

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = logits.log_softmax(1)
        chosen, advantage = (
            logprobs.gather(1, targets[rows, None]).squeeze(1),
            advantages[rows].to(logits.dtype),
        )
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=torch.finfo(logprobs.dtype).min / 4))
        if old_logprobs is None:
            return -advantage * chosen, {"entropy": entropy}
        ratio = (chosen - old_logprobs[rows].to(logits.dtype)).exp()
        value, clipped = -advantage * ratio, torch.zeros_like(advantage)
        if clip_epsilon is not None:
            bounded = -advantage * ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
            clipped = (bounded > value).to(logits.dtype)
            value = torch.maximum(value, bounded)
        return value, {"entropy": entropy, "ratio_mean": ratio, "clip_fraction": clipped}

    return loss
