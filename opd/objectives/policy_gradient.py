"""Advantages from log-probability differences, and the policy-gradient loss that uses them. Per token, in nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from opd.objectives.fused import TokenLoss

if TYPE_CHECKING:
    from jaxtyping import Float


def discounted_future_sum(values: Float[Tensor, "*batch time"], discount: float) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + γ y_{t+1} along the last axis, nothing after its end. γ = 0 returns the values themselves.

    Added up in float64: over a thousand tokens float32 loses the digits of a sum whose parts cancel.
    """
    if discount == 0:
        return values.clone()
    result = values.to(torch.float64, copy=True)
    for step in range(values.shape[-1] - 2, -1, -1):
        result[..., step] += discount * result[..., step + 1]
    return result.to(values.dtype)


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


def log_ratio_rewards(
    student_logprobs: Float[Tensor, "*batch time"],
    teacher_logprobs: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    *,
    scaling: float = 1.0,
    clip: float | None = None,
) -> Float[Tensor, "*batch time"]:
    """r_t = mask · (log p_teacher - log π_student) / scaling, then held within ±clip. MiniLLM's reward."""
    rewards = (teacher_logprobs - student_logprobs) * loss_mask / scaling
    return rewards if clip is None else rewards.clamp(-clip, clip)


def discounted_returns(
    rewards: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    *,
    discount: float,
    normalizer_discount: float | None,
) -> Float[Tensor, "*batch time"]:
    """A_t = Σ_{i≥t} γ^{i-t} m_i r_i / Σ_{i≥t} δ^{i-t} m_i; 0 where no loss token is left. δ None: not divided.

    δ = γ makes it a weighted mean, so that a constant reward is its own return; δ = 1 divides by the number of
    remaining tokens. Masked slots count 0 but take up time; their own A is the mean over the loss tokens after them.
    """
    returns = discounted_future_sum(rewards * loss_mask, discount)
    if normalizer_discount is None:
        return returns
    weights = discounted_future_sum(loss_mask, normalizer_discount)
    return torch.where(weights > 0, returns / weights.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)


def minillm_advantages(
    rewards: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    *,
    discount: float,
    length_normalization: bool,
    mode: Literal["trl", "paper", "lmops"],
) -> Float[Tensor, "*batch time"]:
    """A_t of the rewards of each token and those after it; 0 at masked slots.

    trl: Σ_{i≥t} γ^{i-t} r_i, normalised by Σ_{i≥t} γ^{i-t} m_i. paper (Gu et al. 2024): the same of token t+1, since
    r_t is left to the exact single-step term. lmops (the authors' code): trl's sum over the number of tokens left.
    """
    normalizer = 1.0 if mode == "lmops" else discount
    returns = discounted_returns(
        rewards, loss_mask, discount=discount, normalizer_discount=normalizer if length_normalization else None
    )
    if mode == "paper":
        returns = torch.nn.functional.pad(returns[..., 1:], (0, 1))
    return returns * loss_mask


def whiten(
    values: Float[Tensor, "*batch time"],
    loss_mask: Float[Tensor, "*batch time"],
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Float[Tensor, "*batch time"]:
    """(x - mean) / √(variance + 1e-8) over the loss tokens of all ranks (variance with n - 1), and 0 elsewhere."""
    mean, std = mean_and_std(values, loss_mask, total)
    count = float(total(loss_mask.sum().double()))
    variance = std**2 * count / max(count - 1.0, 1.0)
    return (values - mean) * loss_mask / (variance + 1e-8) ** 0.5


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
    temperature: float = 1.0,
) -> TokenLoss:
    """-ρ A with ρ = π_θ / π_old (`old_logprobs` given), else -A log π_θ; advantages and π_old are constants.

    Both have the same gradient where π_old = π_θ, but other values. `clip_epsilon`: PPO's pessimistic clip of ρ.
    π_θ is that of the logits divided by `temperature`, and `old_logprobs` must be too.
    Metrics: ratio, its clip indicator, the student's entropy.
    """

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        if temperature != 1.0:
            logits = logits / temperature
        # As token_logprobs forms it: where nothing has moved, the ratio is 1 to the last bit even for large advantages.
        normalizer = logits.logsumexp(1)
        chosen = logits.gather(1, targets[rows, None]).squeeze(1) - normalizer
        advantage = advantages[rows].to(logits.dtype)
        with torch.no_grad():
            probabilities = (logits - normalizer[:, None]).exp()
            finite = logits.clamp(min=torch.finfo(logits.dtype).min / 4)
            entropy = normalizer - torch.linalg.vecdot(probabilities, finite)
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


def weighted_sum(parts: Mapping[str, tuple[float, TokenLoss]]) -> TokenLoss:
    """Σ weight · part, in one pass over the logits; each part's own value is a metric by its name."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = logits.new_zeros(len(logits)), {}
        for name, (weight, part) in parts.items():
            value, own = part(logits, rows)
            total = total + weight * value
            metrics.update(own, **{name: value.detach()})
        return total, metrics

    return loss
