"""Cross-entropy of targets, per token, in nats."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.objectives.fused import TokenLoss


def negative_log_likelihood(targets: Tensor) -> TokenLoss:
    """-log π(targets[n]) as a loss of tokens, with accuracy (argmax is the target) and the student's entropy."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = targets[rows]
        logprobs = logits.log_softmax(1)
        with torch.no_grad():
            hits = (logits.argmax(1) == wanted).to(logits.dtype)
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=torch.finfo(logprobs.dtype).min / 4))
        return -logprobs.gather(1, wanted[:, None]).squeeze(1), {
            "mean_token_accuracy": hits,
            "entropy": entropy,
        }

    return loss
