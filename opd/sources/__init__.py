"""Where sequences come from: the data, the student's rollouts, the teacher's, a mixture; and how teachers read them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from opd.protocols import Example, Kind, Method, TokenSequence, TokenView
from opd.randomness import coin
from opd.sources.rollouts import Completion, Mixture, Sampling, sample
from opd.tokenizers import Vocabulary

if TYPE_CHECKING:
    from opd.sources.text_views import TextViews

__all__ = ["Mixture", "Sampling", "SequenceSource", "sample"]

_ALTERNATIVES = ("rejected", "response")  # kinds that lie in Example.alternatives
Slot = tuple[int, int, Kind, Example]  # number of the prompt in the whole run, member of its group, kind, row


class SequenceSource:
    """Makes the sequences of numbered prompts: each one's coin decides where its completion comes from."""

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
        text_views: TextViews | None = None,
    ) -> None:
        self._method, self._needs = method, method.needs
        self._models = {"student": student, "teacher": teacher, "mixture": student}
        if self._needs.teacher_share and student is not None:
            self._models["mixture"] = Mixture(student, teacher, self._needs.teacher_share)
        self._sampling, self._vocabulary = sampling, vocabulary
        self._group_size, self._seed, self._text_views = group_size, seed, text_views

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """The sequences of these prompts in order, and those of them that were sampled.

        A prompt gives `group_size` members, each of them a sequence of every kind that the method asks for. `prompts`
        are (number of the prompt in the whole run, its row); the number addresses coin and rollout.
        """
        slots: list[Slot] = [
            (number, member, kind, example)
            for number, example in prompts
            for member in range(self._group_size)
            for kind in self._needs.sequences
        ]
        origins = [
            self._method.origin(coin(self._seed, "lmbda", number, member), kind) for number, member, kind, _ in slots
        ]
        made: dict[int, TokenSequence] = {}
        for origin in ("student", "teacher", "mixture"):
            mine = [i for i, chosen in enumerate(origins) if chosen == origin]
            completions = self._sample(origin, [slots[i] for i in mine])
            for i, completion in zip(mine, completions, strict=True):
                _, member, kind, example = slots[i]
                made[i] = TokenSequence(
                    example.row,
                    example.prompt_ids,
                    completion.ids,
                    [True] * len(completion.ids),
                    origin=origin,
                    finished=completion.finished,
                    member=member,
                    kind=kind,
                    token_scores={"sampler_logprobs": torch.tensor(completion.logprobs)} if self._needs.window else {},
                    entropy=completion.entropy,
                )
        sampled = [made[i] for i in sorted(made)]
        everything = [
            made.get(i) or self.from_data(example, kind, member) for i, (_, member, kind, example) in enumerate(slots)
        ]
        for sequence, (_, _, _, example) in zip(everything, slots, strict=True):
            self._add_views(sequence, example)
        return everything, sampled

    def capped(self, max_completion_tokens: int) -> SequenceSource:
        """The same source with shorter rollouts."""
        other = copy.copy(self)
        limit = min(max_completion_tokens, self._sampling.max_completion_tokens)
        other._sampling = replace(self._sampling, max_completion_tokens=limit)
        return other

    def answered(self, rows: Sequence[Example]) -> list[Example]:
        """Those of the rows that bring every completion which the method compares."""
        wanted = set(_ALTERNATIVES) & set(self._needs.sequences)
        return [row for row in rows if row.completion_ids and wanted <= row.alternatives.keys()]

    def from_data(self, example: Example, kind: Kind = "single", member: int = 0) -> TokenSequence:
        """The row's own completion of this kind."""
        alternative = kind in _ALTERNATIVES
        completion = example.alternatives[kind] if alternative else example.completion_ids or []
        if self._needs.prompt_loss:
            ids = example.prompt_ids + completion
            return TokenSequence(example.row, [], ids, [True] * len(ids), member=member, kind=kind)
        mask = None if alternative else example.completion_mask
        mask = [True] * len(completion) if mask is None else mask
        finished = bool(completion) and completion[-1] in self._vocabulary.stop_ids
        made = TokenSequence(
            example.row, example.prompt_ids, completion, mask, finished=finished, member=member, kind=kind
        )
        if self._needs.window:  # of what was not sampled nobody asks it, but a batch has one number a token
            made.token_scores["sampler_logprobs"] = torch.zeros(made.num_loss_tokens)
        return made

    def _sample(self, origin: str, slots: Sequence[Slot]) -> list[Completion]:
        model = self._models[origin]
        if model is None:  # nobody is asked, on any rank
            return []
        return sample(
            model,
            [example.prompt_ids for _, _, _, example in slots],
            addresses=[(self._seed, f"{origin}_rollout", number, member) for number, member, _, _ in slots],
            sampling=self._sampling,
            vocabulary=self._vocabulary,
        )

    def _add_views(self, sequence: TokenSequence, example: Example) -> None:
        """What teachers read that do not read what the student reads; rows may offer it to methods that do not ask."""
        if self._needs.privileged is None and self._text_views is None:
            return
        for name, prompt in example.teacher_prompts.items():
            if self._text_views is not None:
                sequence.views[name], sequence.alignments[name] = self._text_views.view(
                    prompt, sequence.completion_ids, sequence.completion_mask, sequence.finished
                )
            else:
                mask = [False] * len(prompt) + sequence.completion_mask
                sequence.views[name] = TokenView(prompt + sequence.completion_ids, mask)
