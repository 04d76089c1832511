"""Where sequences come from: the data, the student's rollouts, the teacher's rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.models import Vocabulary
from opd.protocols import Example, Method, TokenSequence
from opd.randomness import coin
from opd.sources.rollouts import Completion, Sampling, sample

__all__ = ["Sampling", "SequenceSource", "sample"]


class SequenceSource:
    """Makes the sequences of numbered prompts: each row's coin decides where its completion comes from."""

    def __init__(
        self,
        method: Method,
        *,
        student: Any,
        teacher: Any,
        sampling: Sampling,
        vocabulary: Vocabulary,
        group_size: int,
        seed: int,
    ) -> None:
        self._method, self._models = method, {"student": student, "teacher": teacher}
        self._sampling, self._vocabulary = sampling, vocabulary
        self._group_size, self._seed = group_size, seed

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[Completion]]:
        """`group_size` sequences a prompt, in order, and the completions that were sampled for them.

        `prompts` are (number of the prompt in the whole run, its row); the number addresses coin and rollout.
        """
        slots = [(number, member, example) for number, example in prompts for member in range(self._group_size)]
        origins = [self._method.origin(coin(self._seed, "lmbda", number, member)) for number, member, _ in slots]
        made: dict[int, TokenSequence] = {}
        sampled: list[Completion] = []
        for origin in ("student", "teacher"):
            mine = [i for i, chosen in enumerate(origins) if chosen == origin]
            completions = self._sample(origin, [slots[i] for i in mine])
            sampled += completions
            for i, completion in zip(mine, completions, strict=True):
                _, member, example = slots[i]
                made[i] = TokenSequence(
                    example.row,
                    example.prompt_ids,
                    completion.ids,
                    [True] * len(completion.ids),
                    origin=origin,
                    finished=completion.finished,
                    member=member,
                )
        return [made.get(i) or self._from_data(slot[2], slot[1]) for i, slot in enumerate(slots)], sampled

    def _sample(self, origin: str, slots: Sequence[tuple[int, int, Example]]) -> list[Completion]:
        if not slots:
            return []
        return sample(
            self._models[origin],
            [example.prompt_ids for _, _, example in slots],
            addresses=[(self._seed, f"{origin}_rollout", number, member) for number, member, _ in slots],
            sampling=self._sampling,
            vocabulary=self._vocabulary,
        )

    def _from_data(self, example: Example, member: int) -> TokenSequence:
        completion = example.completion_ids or []
        if self._method.needs.prompt_loss:
            ids = example.prompt_ids + completion
            return TokenSequence(example.row, [], ids, [True] * len(ids), member=member)
        mask = example.completion_mask if example.completion_mask is not None else [True] * len(completion)
        finished = bool(completion) and completion[-1] in self._vocabulary.stop_ids
        return TokenSequence(example.row, example.prompt_ids, completion, mask, finished=finished, member=member)
