"""Sums over loss tokens of any function of the logits, without ever holding all logits.

The head is applied to a few tokens at a time; their loss, its gradient with respect to the hidden states and to the
head are formed at once, and the logits are dropped. What is kept is two buffers, [tokens, hidden] and (if the head
trains) [vocabulary, hidden], whatever the number of tokens. Arithmetic on logits is in float32, or in float64 if the
inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.protocols import Dense, Head

TokenLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""(logits of some tokens [n, V], which tokens) -> (their losses [n], differentiable; metrics [n], constant)."""

# Bytes of logits held at a time. On a CPU the sweet spot is about the size of the caches (benchmarks/loss.py);
# on a GPU larger tiles keep the matrix units busy.
_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20, "mps": 64 * 2**20}


@dataclass(frozen=True)
class Summed:
    """The weighted sum of the token losses (differentiable), each token's loss and its metrics (constant)."""

    loss: Tensor  # ()
    values: Tensor  # (N,)
    metrics: dict[str, Tensor]  # {name: (N,)}

    def means(self, *names: str) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """(sum, number of tokens) of these metrics; one that this loss did not produce is left out."""
        return {name: (self.metrics[name].sum(), len(self.values)) for name in names if name in self.metrics}


def sum_over_tokens(student: Dense, token_loss: TokenLoss, *, weights: Tensor | None = None) -> Summed:
    """Σ_n weights[n] · token_loss(logits[n]). Zero tokens give a zero that still hangs on the graph.

    `weights` (N,) are constants; a loss that is not linear in the token losses wants `token_logprobs` instead.
    """
    head = student.head
    collected: dict[str, list[Tensor]] = {}
    loss = _SumOverTokens.apply(student.hidden, head.weight, head.bias, head, token_loss, weights, collected)
    empty = student.hidden.new_zeros(0)
    columns = {name: torch.cat(parts) for name, parts in collected.items()}
    return Summed(loss, columns.pop("", empty), columns)


def token_logprobs(student: Dense, targets: Tensor) -> Tensor:
    """log π(targets[n]) in nats, (N,). Without gradient: for old policies, references and teachers."""
    return torch.cat([_gathered_logprobs(final_logits(student, rows), targets[rows]) for rows in tiles(student)])


def head_logits(scores: Dense, rows: slice) -> Tensor:
    """The head's output for some tokens, (n, V), before scale and cap, in the precision of the loss."""
    hidden, head = scores.hidden[rows], scores.head
    if head.weight is None:
        logits = hidden[:, : head.vocab_size]
    else:
        weight, bias = head.weight[: head.vocab_size], head.bias
        hidden, weight = _compute_dtype(hidden, weight)
        logits = F.linear(hidden, weight, None if bias is None else bias[: head.vocab_size].to(hidden.dtype))
    return logits.to(_wide(logits.dtype))


def final_logits(scores: Dense, rows: slice) -> Tensor:
    """The model's logits for some tokens, (n, V)."""
    return scores.head.finish(head_logits(scores, rows))


def _gathered_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the multiplication: autocast's where it is on, else the weight's."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def tiles(scores: Dense) -> Iterator[slice]:
    """Rows to work on at a time. No tokens are one empty tile, so that results keep their dtype and their names."""
    hidden, head = scores.hidden, scores.head
    columns = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    size = max(16, _TILE_BYTES.get(hidden.device.type, 2**24) // (4 * min(columns, head.vocab_size or columns)))
    return (slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size))


class _SumOverTokens(torch.autograd.Function):
    """Forms the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, token_loss: TokenLoss, weights, collected):
        scores = Dense(hidden.detach(), head)
        grads = [
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        for rows in tiles(scores):
            raw = head_logits(scores, rows)
            with torch.enable_grad():
                leaf = raw.detach().requires_grad_(any(ctx.needs_input_grad[:3]))
                values, metrics = token_loss(head.finish(leaf), rows)
                weighted = (values if weights is None else values * weights[rows]).sum()
            total += weighted.detach()
            for name, column in {"": values, **metrics}.items():
                collected.setdefault(name, []).append(column.detach())
            if weighted.requires_grad:
                (grad_logits,) = torch.autograd.grad(weighted, leaf)
                _accumulate(grads, grad_logits, scores, rows)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        return (
            *(None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors),
            *[None] * 4,
        )


def _accumulate(grads: list[Tensor | None], grad_logits: Tensor, scores: Dense, rows: slice) -> None:
    """Add one tile's gradients to those of hidden (N, H), weight (V, H) and bias (V,)."""
    grad_hidden, grad_weight, grad_bias = grads
    width = scores.head.vocab_size
    if scores.head.weight is None:
        if grad_hidden is not None:
            grad_hidden[rows, :width] = grad_logits.to(grad_hidden.dtype)
        return
    hidden, weight = _compute_dtype(scores.hidden[rows], scores.head.weight[:width])
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = (grad_logits @ weight).to(grad_hidden.dtype)
    if grad_weight is not None:
        if grad_weight.dtype == hidden.dtype:
            grad_weight[:width].addmm_(grad_logits.t(), hidden)
        else:
            grad_weight[:width] += grad_logits.t() @ hidden
    if grad_bias is not None:
        grad_bias[:width] += grad_logits.sum(0)
