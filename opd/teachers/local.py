"""A teacher that this process holds, or its part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from opd.models import read_head, within_forward
from opd.objectives import token_logprobs, top_k_scores
from opd.protocols import Dense, Layout, Scores, TokenSequence
from opd.sharding import communicates, is_sharded, whole
from opd.teachers.base import Teacher


class LocalTeacher(Teacher):
    """A frozen model, or a student WithoutAdapter; `top_k` makes its scores sparse.

    Its weights lie where hardware.teacher_placement put them. Those of a sharded one are nowhere whole between its
    forwards, and every forward is collective: all ranks ask it equally often, or inside of `asked_unevenly`.
    """

    def __init__(self, model: Any, *, vocab_size: int, top_k: int | None = None) -> None:
        self.model, self._vocab_size, self._top_k = model, vocab_size, top_k
        self._copies: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    @property
    def sharded_model(self) -> Any:
        """The model, while it communicates."""
        return self.model if communicates(self.model) else None

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
            return within_forward(self.model, layout, self._dense)

    def _dense(self, hidden: Tensor) -> Dense:
        head = read_head(self.model, self._vocab_size)
        if is_sharded(self.model):
            head = replace(head, weight=self._copy("weight", head.weight), bias=self._copy("bias", head.bias))
        return Dense(hidden, head)

    def _copy(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """What is whole within this forward only, for the scores to keep; all that are alive share one."""
        if tensor is None:
            return None
        gathered = whole(tensor)  # even if there is a copy: other ranks may have none, and it can be collective
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = gathered.clone()
        return copy
