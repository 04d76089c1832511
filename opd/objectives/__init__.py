"""Pure tensor functions: no models, no config. Names load on first use, so that a method's schema needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.objectives.divergence import divergence_loss as divergence_loss
    from opd.objectives.divergence import generalized_jsd as generalized_jsd
    from opd.objectives.divergence import sampled_token_loss as sampled_token_loss
    from opd.objectives.divergence import scores_on as scores_on
    from opd.objectives.divergence import top_k_scores as top_k_scores
    from opd.objectives.fused import Summed as Summed
    from opd.objectives.fused import sum_over_tokens as sum_over_tokens
    from opd.objectives.fused import token_logprobs as token_logprobs
    from opd.objectives.fused import token_values as token_values
    from opd.objectives.likelihood import negative_log_likelihood as negative_log_likelihood
    from opd.objectives.policy_gradient import center_advantages as center_advantages
    from opd.objectives.policy_gradient import discounted_future_sum as discounted_future_sum
    from opd.objectives.policy_gradient import discounted_returns as discounted_returns
    from opd.objectives.policy_gradient import log_ratio_rewards as log_ratio_rewards
    from opd.objectives.policy_gradient import mean_and_std as mean_and_std
    from opd.objectives.policy_gradient import minillm_advantages as minillm_advantages
    from opd.objectives.policy_gradient import pad_rows as pad_rows
    from opd.objectives.policy_gradient import policy_gradient_loss as policy_gradient_loss
    from opd.objectives.policy_gradient import reverse_kl_advantages as reverse_kl_advantages
    from opd.objectives.policy_gradient import weighted_sum as weighted_sum
    from opd.objectives.policy_gradient import whiten as whiten
    from opd.objectives.preference import complete_pairs as complete_pairs
    from opd.objectives.preference import expected_advantage_loss as expected_advantage_loss
    from opd.objectives.preference import forward_kl_loss as forward_kl_loss
    from opd.objectives.preference import pair_logprobs as pair_logprobs
    from opd.objectives.preference import pair_loss as pair_loss
    from opd.objectives.preference import reward_metrics as reward_metrics
    from opd.objectives.preference import terms_by_kind as terms_by_kind
    from opd.objectives.preference import terms_by_pair as terms_by_pair
    from opd.objectives.uld import GroupedTokens as GroupedTokens
    from opd.objectives.uld import VocabularyMatch as VocabularyMatch
    from opd.objectives.uld import grouped_loss as grouped_loss
    from opd.objectives.uld import hybrid_distance as hybrid_distance
    from opd.objectives.uld import sorted_distance as sorted_distance

_ROOMS = ("divergence", "fused", "likelihood", "policy_gradient", "preference", "uld")


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name not in _ROOMS:
        for room in _ROOMS:
            module = import_module(f"{__name__}.{room}")
            if getattr(module, name, None) is not None and getattr(module, name).__module__ == module.__name__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
