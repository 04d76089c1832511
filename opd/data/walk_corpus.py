"""An endless corpus of number walks, to train the embedded models from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opd.data.walk_rules import (
    NUMBERS,
    Pair,
    detour_trace,
    optimal_path,
    render_path,
    render_prompt,
    training_pairs,
)
from opd.data.walk_text import chat, encode, end_id, prompt_token_ids, walk_fields
from opd.errors import ConfigError
from opd.protocols import Example
from opd.randomness import generator, permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HINT_FOLLOWED = 0.5  # share of the hinted rows whose answer is the hint


class WalkCorpus:
    """`num_rows` fresh walks over the training pairs; row i = f(seed, i).

    Each pass over the 6941 pairs is a permutation of them. With `detour_probability` 0 the walks are shortest
    ones (a base student, which has never seen itself off the path); with 0.15 they are detour traces, whose
    completion_mask is false on the tokens of each detour (a teacher that finds its way back). A trace cut at
    16 numbers has no end token.

    `hint_probability` is the share of rows whose prompt shows a shortest walk. Half of these answer with it;
    the others, like rows without a hint, are walks as above, so the hint is worth following and no order.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        seed: int = 0,
        *,
        detour_probability: float = 0.0,
        hint_probability: float = 0.0,
    ) -> None:
        if num_rows < 1:
            raise ConfigError(f"num_rows of the walk corpus must be at least 1, got {num_rows}")
        for name, value in (("detour_probability", detour_probability), ("hint_probability", hint_probability)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {value}")
        self._num_rows, self._seed = num_rows, seed
        self._detour_probability, self._hint_probability = detour_probability, hint_probability
        self._pieces = _Pieces(tokenizer)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < self._num_rows:
            raise IndexError(row)
        start, goal = self._pair(row)
        rng = generator(self._seed, "walk_corpus", row)
        path, is_detour = detour_trace(start, goal, rng, self._detour_probability)
        hint, follows = self._hint(row, start, goal)
        if follows:
            path, is_detour = hint, [False] * len(hint)
        completion_ids, mask = self._pieces.completion(path, is_detour, finished=path[-1] == goal)
        return Example(
            row,
            self._pieces.prompt(start, goal, hint),
            completion_ids,
            mask if self._detour_probability else None,
            fields=walk_fields(start, goal, render_path(path), hint),
        )

    def _hint(self, row: int, start: int, goal: int) -> tuple[list[int], bool]:
        """The hint of a row, empty if it has none, and whether the answer is this hint."""
        if not self._hint_probability:
            return [], False
        rng = generator(self._seed, "walk_corpus_hint", row)
        if rng.random() >= self._hint_probability:
            return [], False
        follows = rng.random() < HINT_FOLLOWED
        return optimal_path(start, goal, rng), follows

    def _pair(self, row: int) -> Pair:
        pairs = training_pairs()
        pass_number, position = divmod(row, len(pairs))
        if pass_number not in self._orders:
            self._orders[pass_number] = permutation(len(pairs), self._seed, "walk_corpus_order", pass_number)
        return pairs[self._orders[pass_number][position]]


class _Pieces:
    """Prompts and walks put together from the ids of their numbers, each encoded once: rows are made by the thousand.

    Raises ConfigError if the tokenizer reads a whole text differently from its numbers one by one. A number may be
    several tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        mark = render_prompt(NUMBERS[0], NUMBERS[0])
        before, _, after = chat(tokenizer, mark).partition(mark)
        self._before, self._after = encode(tokenizer, before), encode(tokenizer, after)
        self._to, self._hint = encode(tokenizer, " to"), encode(tokenizer, "\nhint:")
        self._first = {number: encode(tokenizer, f"{number}") for number in NUMBERS}
        self._later = {number: encode(tokenizer, f" {number}") for number in NUMBERS}
        self._end = end_id(tokenizer)
        for number in NUMBERS:
            path = [number, *NUMBERS]
            completion_ids, _ = self.completion(path, [False] * len(path), finished=True)
            whole_completion = [*encode(tokenizer, render_path(path)), self._end]
            plain, hinted = (prompt_token_ids(tokenizer, number, number, hint) for hint in ([], path))
            in_pieces = (completion_ids, self.prompt(number, number), self.prompt(number, number, path))
            if in_pieces != (whole_completion, plain, hinted):
                raise ConfigError(
                    f"the walk corpus needs a tokenizer that encodes numbers one by one; at {number}, "
                    f"{tokenizer.name_or_path!r} does not: use opd.data.walk_tokenizer.build_tokenizer"
                )

    def prompt(self, start: int, goal: int, hint: Sequence[int] = ()) -> list[int]:
        """Equal to prompt_token_ids."""
        shown = [*self._hint, *(token for number in hint for token in self._later[number])] if hint else []
        return [*self._before, *self._first[start], *self._to, *self._later[goal], *shown, *self._after]

    def completion(
        self, path: Sequence[int], is_detour: Sequence[bool], finished: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids of the walk, and the mask: false on every token of a detour, true on the end token."""
        ids: list[int] = []
        mask: list[bool] = []
        pieces = self._first
        for number, detour in zip(path, is_detour, strict=True):
            piece = pieces[number]
            ids += piece
            mask += [not detour] * len(piece)
            pieces = self._later
        return ([*ids, self._end], [*mask, True]) if finished else (ids, mask)
