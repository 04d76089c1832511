"""Sums over loss tokens of any function of the logits, without ever holding all logits.

The head is applied to a few tokens at a time; their loss, its gradient with respect to the hidden states and to the
head are formed at once, and the logits are dropped. What is kept is two buffers, [tokens, hidden] and (if the head
trains) [vocabulary, hidden], whatever the number of tokens. A loss that is not a sum of token losses takes the tokens'
values instead (`token_values`); their logits are made a second time on the way back. Arithmetic on logits is in
float32, or in float64 if the inputs are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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


def sum_over_tokens(
    student: Dense, token_loss: TokenLoss, *, weights: Tensor | None = None, cuts: Sequence[int] | None = None
) -> Summed:
    """Σ_n weights[n] · token_loss(logits[n]). Zero tokens give a zero that still hangs on the graph.

    `weights` (N,) are constants. The loss must be linear in the token losses: its gradient is formed at once. A loss
    that reads several tokens together names the token numbers, ascending, before which tokens may be parted: `cuts`.
    """
    head, tracked = student.head, torch.is_grad_enabled()
    inputs = (student.hidden, head.weight, head.bias)
    if not tracked:  # a Function would form the gradients of parameters all the same
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    collected: dict[str, list[Tensor]] = {}
    dtype = _computing_dtype(student)  # autocast's, which is off from here on: what follows says its dtypes
    with torch.autocast(student.hidden.device.type, enabled=False):
        loss = _SumOverTokens.apply(*inputs, head, dtype, token_loss, weights, cuts, collected)
    columns = {name: torch.cat(parts) for name, parts in collected.items()}
    return Summed(loss, columns.pop(""), columns)


def token_values(student: Dense, token_loss: TokenLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """token_loss(logits[n]) of every token, (N,), differentiable, and its metrics, constant: {name: (N,)}."""
    head, collected = student.head, {}
    dtype = _computing_dtype(student)
    with torch.autocast(student.hidden.device.type, enabled=False):
        values = _TokenValues.apply(student.hidden, head.weight, head.bias, head, dtype, token_loss, collected)
    return values, {name: torch.cat(parts) for name, parts in collected.items()}


def token_logprobs(student: Dense, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log π(targets[n]) in nats, (N,), of the logits divided by `temperature`; differentiable."""
    return token_values(student, lambda logits, rows: (_gathered_logprobs(logits / temperature, targets[rows]), {}))[0]


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


def _computing_dtype(scores: Dense) -> torch.dtype:
    """What the head multiplies in: autocast's type, else the head's own."""
    kind = scores.hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return scores.hidden.dtype if scores.head.weight is None else scores.head.weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def tiles(scores: Dense, cuts: Sequence[int] | None = None) -> Iterator[slice]:
    """Rows to work on at a time. No tokens are one empty tile, so that results keep their dtype and their names.

    `cuts`: ascending row numbers, the only ones that a tile after the first may begin at; what lies between two of them
    stays together, however large.
    """
    hidden, head = scores.hidden, scores.head
    columns = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    size = max(16, _TILE_BYTES.get(hidden.device.type, 2**24) // (4 * min(columns, head.vocab_size or columns)))
    start, end = 0, len(hidden)
    while True:
        stop = min(start + size, end)
        if cuts is not None and stop < end:
            allowed = bisect_right(cuts, stop)
            if allowed and cuts[allowed - 1] > start:
                stop = cuts[allowed - 1]
            else:
                stop = cuts[allowed] if allowed < len(cuts) else end
        yield slice(start, stop)
        if stop >= end:
            return
        start = stop


class _SumOverTokens(torch.autograd.Function):
    """Forms the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, dtype, token_loss: TokenLoss, weights, cuts, collected):
        needed = ctx.needs_input_grad[:3]
        grads = _empty_gradients((hidden, weight, bias), needed)
        scores = _in_dtype((hidden, weight, bias), head, dtype)
        total = torch.zeros((), dtype=_wide(dtype), device=hidden.device)
        for rows in tiles(scores, cuts):
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
        return (*scaled, *[None] * 6)


class _TokenValues(torch.autograd.Function):
    """Each token's value; backward makes the logits again, now that it is known what each token counts."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, dtype, token_loss: TokenLoss, collected):
        scores, values = _in_dtype((hidden, weight, bias), head, dtype), []
        for rows in tiles(scores):
            value, metrics = token_loss(final_logits(scores, rows), rows)
            values.append(value)
            for name, column in metrics.items():
                collected.setdefault(name, []).append(column)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.made_with = head, dtype, token_loss
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad_values):
        inputs, (head, dtype, token_loss) = ctx.saved_tensors, ctx.made_with
        grads = _empty_gradients(inputs, ctx.needs_input_grad[:3])
        scores = _in_dtype(inputs, head, dtype)
        with torch.autocast(grad_values.device.type, enabled=False):
            for rows in tiles(scores):
                leaf = _head_logits(scores, rows).detach().requires_grad_()
                with torch.enable_grad():
                    values, _ = token_loss(head.finish(leaf), rows)
                (grad_logits,) = torch.autograd.grad(values, leaf, grad_values[rows])
                _accumulate(grads, grad_logits.to(dtype), scores, rows)
        pairs = zip(grads, inputs, strict=True)
        return (*(None if grad is None else grad.to(like.dtype) for grad, like in pairs), *[None] * 4)


def _empty_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Summed over tiles in at least float32, whatever the parameters' own precision."""
    return [
        torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if wanted and tensor is not None else None
        for tensor, wanted in zip(inputs, needed, strict=True)
    ]


def _in_dtype(inputs: Sequence[Tensor | None], head: Head, dtype: torch.dtype) -> Dense:
    """Hidden states, weight and bias in the dtype of the multiplication."""
    hidden, weight, bias = [None if tensor is None else tensor.detach().to(dtype) for tensor in inputs]
    assert hidden is not None
    return Dense(hidden, replace(head, weight=weight, bias=bias))


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
