"""Sums over loss tokens of any function of the logits, without ever holding all logits.

The head is applied to a few tokens at a time; their loss, its gradient with respect to the hidden states and to the
head are formed at once, and the logits are dropped. What is kept is two buffers, [tokens, hidden] and (if the head
trains) [vocabulary, hidden], whatever the number of tokens. Arithmetic on logits is in float32, or in float64 if the
inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.protocols import Dense, Head

TokenLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""(logits of some tokens [n, V], which tokens) -> (their losses [n], differentiable; metrics [n], constant)."""

# Bytes of logits held at a time. On a CPU smaller tiles are slower, because the head's gradient is read and written
# once a tile, and larger ones only cost memory (docs/lab-log.md). The GPU's size is a guess, not yet measured.
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

    `weights` (N,) are constants. The loss must be linear in the token losses: its gradient is formed at once.
    """
    head, tracked = student.head, torch.is_grad_enabled()
    inputs = (student.hidden, head.weight, head.bias)
    if not tracked:  # a Function would form the gradients of parameters all the same
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    kind, collected = student.hidden.device.type, {}
    dtype = student.hidden.dtype if head.weight is None else head.weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):  # from here on dtypes are explicit, the teacher's its own
        loss = _SumOverTokens.apply(*inputs, head, dtype, token_loss, weights, collected)
    columns = {name: torch.cat(parts) for name, parts in collected.items()}
    return Summed(loss, columns.pop(""), columns)


def token_logprobs(student: Dense, targets: Tensor) -> Tensor:
    """log π(targets[n]) in nats, (N,). Without gradient: for old policies, references and teachers."""
    with torch.no_grad():
        return torch.cat([_gathered_logprobs(final_logits(student, rows), targets[rows]) for rows in tiles(student)])


def final_logits(scores: Dense, rows: slice) -> Tensor:
    """The model's logits for some tokens, (n, V), in the precision of the loss."""
    return scores.head.finish(_head_logits(scores, rows))


def _head_logits(scores: Dense, rows: slice) -> Tensor:
    """Before scale and cap; multiplied in the head's dtype."""
    hidden, head = scores.hidden[rows], scores.head
    if head.weight is None:
        logits = hidden[:, : head.vocab_size]
    else:
        bias = None if head.bias is None else head.bias[: head.vocab_size]
        logits = F.linear(hidden.to(head.weight.dtype), head.weight[: head.vocab_size], bias)
    return logits.to(_wide(logits.dtype))


def _gathered_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def tiles(scores: Dense) -> Iterator[slice]:
    """Rows to work on at a time. No tokens are one empty tile, so that results keep their dtype and their names."""
    hidden, head = scores.hidden, scores.head
    columns = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    size = max(16, _TILE_BYTES.get(hidden.device.type, 2**24) // (4 * min(columns, head.vocab_size or columns)))
    return (slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size))


class _SumOverTokens(torch.autograd.Function):
    """Forms the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, dtype, token_loss: TokenLoss, weights, collected):
        needed = ctx.needs_input_grad[:3]
        # Summed over tiles in at least float32, whatever the parameters' own precision.
        grads = [
            torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), needed, strict=True)
        ]
        cast = [None if tensor is None else tensor.detach().to(dtype) for tensor in (hidden, weight, bias)]
        scores = Dense(cast[0], replace(head, weight=cast[1], bias=cast[2]))  # type: ignore[arg-type]
        total = torch.zeros((), dtype=_wide(dtype), device=hidden.device)
        for rows in tiles(scores):
            leaf = _head_logits(scores, rows).detach().requires_grad_(any(needed))
            with torch.enable_grad():
                values, metrics = token_loss(head.finish(leaf), rows)
                weighted = (values if weights is None else values * weights[rows]).sum()
            total += weighted.detach()
            for name, column in {"": values, **metrics}.items():
                collected.setdefault(name, []).append(column.detach())
            if weighted.requires_grad:
                (grad_logits,) = torch.autograd.grad(weighted, leaf)
                _accumulate(grads, grad_logits.to(dtype), scores, rows)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx, grad_total):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in pairs)
        return (*scaled, *[None] * 5)


def _accumulate(grads: list[Tensor | None], grad_logits: Tensor, scores: Dense, rows: slice) -> None:
    """Add one tile's gradients to those of hidden (N, H), weight (V, H) and bias (V,)."""
    grad_hidden, grad_weight, grad_bias = grads
    hidden, weight, width = scores.hidden[rows], scores.head.weight, scores.head.vocab_size
    if grad_hidden is not None:
        if weight is None:
            grad_hidden[rows, :width] = grad_logits
        else:
            grad_hidden[rows] = grad_logits @ weight[:width]
    if grad_weight is not None:
        if grad_weight.dtype == hidden.dtype:
            grad_weight[:width].addmm_(grad_logits.t(), hidden)
        else:
            grad_weight[:width] += grad_logits.t() @ hidden
    if grad_bias is not None:
        grad_bias[:width] += grad_logits.sum(0)
