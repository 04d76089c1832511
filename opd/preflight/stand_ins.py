"""Teachers that stand in for a run's own while it is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.objectives import top_k_scores
from opd.objectives.fused import final_logits
from opd.protocols import Dense, Head, Layout, Scores, Sparse, TokenSequence
from opd.teachers import Teacher


class Remembering(Teacher):
    """Asks a teacher once about the same sequences: the student may move meanwhile, and a teacher with it."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._answers: dict[tuple, tuple[list[TokenSequence], Scores | Tensor]] = {}

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Scores:
        """Its scores of the first time."""
        return self._once("score", sequences, lambda: self._teacher.score(layout, sequences))  # type: ignore[return-value]

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """Its log-probabilities of the first time."""

        def ask() -> Tensor:
            return self._teacher.logprobs(layout, sequences, temperature=temperature)

        return self._once(temperature, sequences, ask)  # type: ignore[return-value]

    @property
    def heads(self) -> set[int]:
        """Addresses of the weights that its scores still read."""
        kept = (answer for _, answer in self._answers.values() if isinstance(answer, Dense))
        return {answer.head.weight.data_ptr() for answer in kept if answer.head.weight is not None}

    def _once(
        self, asked: object, sequences: Sequence[TokenSequence], ask: Callable[[], Scores | Tensor]
    ) -> Scores | Tensor:
        address = (asked, *map(id, sequences))
        if address not in self._answers:
            self._answers[address] = (list(sequences), ask())  # the sequences live as long as their ids are compared
        return self._answers[address][1]


class Flattened(Teacher):
    """A teacher in doubt: its probabilities to the power 1/2, renormalised; its lone log-probabilities halved."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Scores:
        """Its distributions, flatter."""
        scores = self._teacher.score(layout, sequences)
        if isinstance(scores, Dense):
            if scores.head.softcap is None:
                return Dense(scores.hidden, replace(scores.head, scale=0.5 * scores.head.scale))
            with torch.no_grad():  # what is halved is the capped logit
                return Dense(0.5 * final_logits(scores, slice(None)), Head(None))
        flat = (0.5 * torch.cat([scores.logprobs, scores.tail[:, None]], dim=1)).log_softmax(1)
        return Sparse(scores.ids, flat[:, :-1], flat[:, -1])

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """Its log-probabilities, halved."""
        return 0.5 * self._teacher.logprobs(layout, sequences, temperature=temperature)


class StudentAsTeacher(Teacher):
    """The student under a teacher's name, reading what the student reads, whatever the teacher would."""

    def __init__(self, own: Teacher, lay_out: Callable[[Sequence[TokenSequence]], Layout], top_k: int | None) -> None:
        self._own, self._lay_out, self._top_k = own, lay_out, top_k

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Scores:
        """The student's distributions."""
        scores = self._own.score(self._lay_out(sequences), sequences)
        if self._top_k is None or not isinstance(scores, Dense):
            return scores
        with torch.no_grad():
            return top_k_scores(scores, self._top_k)

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """The student's log-probabilities."""
        return self._own.logprobs(self._lay_out(sequences), sequences, temperature=temperature)
