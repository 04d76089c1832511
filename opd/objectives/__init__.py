"""Pure tensor functions: no models, no config. Names load on first use, so that a method's schema needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.objectives.divergence import divergence_loss, generalized_jsd, top_k_scores
    from opd.objectives.fused import Summed, sum_over_tokens, token_logprobs
    from opd.objectives.likelihood import negative_log_likelihood
    from opd.objectives.policy_gradient import (
        center_advantages,
        discounted_future_sum,
        mean_and_std,
        pad_rows,
        policy_gradient_loss,
        reverse_kl_advantages,
    )

_HOMES = {
    "divergence_loss": "divergence",
    "generalized_jsd": "divergence",
    "top_k_scores": "divergence",
    "Summed": "fused",
    "sum_over_tokens": "fused",
    "token_logprobs": "fused",
    "negative_log_likelihood": "likelihood",
    "center_advantages": "policy_gradient",
    "discounted_future_sum": "policy_gradient",
    "mean_and_std": "policy_gradient",
    "pad_rows": "policy_gradient",
    "policy_gradient_loss": "policy_gradient",
    "reverse_kl_advantages": "policy_gradient",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
