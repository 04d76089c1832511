"""Who scores sequences. One method of a teacher each for the two things that are asked of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from opd.protocols import Layout, Scores
from opd.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]


class Teacher(Protocol):
    """Scores of a layout's loss tokens."""

    def score(self, layout: Layout) -> Scores:
        """Distributions, dense or sparse."""
        ...

    def logprobs(self, layout: Layout) -> Tensor:
        """log p(targets[n]) in nats, (N,)."""
        ...
