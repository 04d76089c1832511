"""Pure tensor functions: no models, no config. Names load on first use, so that a method's schema needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.objectives.divergence import divergence_loss as divergence_loss
    from opd.objectives.divergence import generalized_jsd as generalized_jsd
    from opd.objectives.divergence import top_k_scores as top_k_scores
    from opd.objectives.fused import Summed as Summed
    from opd.objectives.fused import sum_over_tokens as sum_over_tokens
    from opd.objectives.fused import token_logprobs as token_logprobs
    from opd.objectives.likelihood import negative_log_likelihood as negative_log_likelihood
    from opd.objectives.policy_gradient import center_advantages as center_advantages
    from opd.objectives.policy_gradient import discounted_future_sum as discounted_future_sum
    from opd.objectives.policy_gradient import mean_and_std as mean_and_std
    from opd.objectives.policy_gradient import pad_rows as pad_rows
    from opd.objectives.policy_gradient import policy_gradient_loss as policy_gradient_loss
    from opd.objectives.policy_gradient import reverse_kl_advantages as reverse_kl_advantages

_ROOMS = ("divergence", "fused", "likelihood", "policy_gradient")


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name not in _ROOMS:
        for room in _ROOMS:
            module = import_module(f"{__name__}.{room}")
            if getattr(module, name, None) is not None and getattr(module, name).__module__ == module.__name__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
