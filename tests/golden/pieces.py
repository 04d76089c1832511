"""Pieces of a golden case as training makes them: methods, sequences, layouts, losses and their gradients.

Labels and tokens are not shifted: -100 marks a token that is not a target, and the logits at position t - 1 score the
label at t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd.data.collate import lay_out
from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, Layout, Method, Scores, TokenSequence

IGNORED = -100
Evaluator = Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]]
"""(params of the case, its in_* tensors) -> its out_* tensors."""


def method(name: str, **settings: Any) -> Method:
    method = METHODS[name]
    return method(method.Config(name=name, **settings))


def sequences(labels: Tensor, tokens: Tensor | None = None) -> tuple[list[TokenSequence], Layout]:
    """Sequences and layout as training makes them: a completion starts at the first target."""
    ids = labels.clamp(min=0) if tokens is None else tokens
    rows, length = labels.shape
    is_target = labels != IGNORED
    sequences = []
    for row in range(rows):
        start = int(is_target[row].nonzero()[0]) if is_target[row].any() else length
        sequence = ids[row].tolist()
        sequences.append(TokenSequence(row, sequence[:start], sequence[start:], is_target[row, start:].tolist()))
    return sequences, lay_out([sequence.student_view for sequence in sequences], pad_id=0)


def rows(logits: Tensor, layout: Layout, vocab_size: int | None = None) -> Dense:
    return Dense(logits.flatten(0, 1)[layout.predictors], Head(None, vocab_size=vocab_size))


def loss_and_grad(
    method: Method,
    logits: Tensor,
    teachers: dict[str, Scores],
    batch: Batch,
    num_items: int | None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Σ weight · sum / count, and its gradient with respect to all the logits. No tokens: 0 / 1."""
    leaf = logits.clone().requires_grad_()
    terms = method.loss(rows(leaf, batch.layout, vocab_size), teachers, batch).terms
    tokens = sum(sequence.num_loss_tokens for sequence in batch.sequences)
    counts = {"tokens": num_items or tokens or 1, **method.counts(batch.sequences)}
    loss = sum(term.weight * term.sum / counts[term.count] for term in terms)
    loss.backward()
    return {
        "out_loss": loss,
        "out_loss_sum": sum(term.weight * term.sum for term in terms),
        "out_grad": leaf.grad,
        "out_n_tokens": torch.tensor(tokens, dtype=logits.dtype),
    }


def spread(values: Tensor, layout: Layout, logits: Tensor) -> Tensor:
    """Values of the loss tokens at their predictors' positions, 0 elsewhere: (rows, length - 1)."""
    rows, length = logits.shape[:2]
    spread = values.new_zeros(rows * length)
    spread[layout.predictors] = values
    return spread.view(rows, length)[:, :-1]
