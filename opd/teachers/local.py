"""A teacher that lies in this process, whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd.models import predicting_states, read_head
from opd.objectives import token_logprobs, top_k_scores
from opd.protocols import Dense, Layout, Scores, TokenSequence
from opd.teachers.base import Teacher


class LocalTeacher(Teacher):
    """A frozen model, or a student WithoutAdapter; `top_k` makes its scores sparse."""

    def __init__(self, model: Any, *, vocab_size: int, top_k: int | None = None) -> None:
        self.model, self._top_k = model, top_k
        self._head = read_head(model, vocab_size)

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Scores:
        """Hidden states and head of the loss tokens, or their top-k log-probabilities and tail."""
        dense = self.dense(layout)
        if self._top_k is None:
            return dense
        with torch.no_grad():
            return top_k_scores(dense, self._top_k)

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """log p(targets[n]), (N,)."""
        with torch.no_grad():
            return token_logprobs(self.dense(layout), layout.targets, temperature=temperature)

    def dense(self, layout: Layout) -> Dense:
        """Whole distributions, whatever top_k says: what evaluation measures against."""
        # The teacher computes in its own dtype: the student's autocast must not reach it.
        with torch.no_grad(), torch.autocast(layout.input_ids.device.type, enabled=False):
            return Dense(predicting_states(self.model, layout), self._head)
