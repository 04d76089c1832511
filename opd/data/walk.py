"""The number walk (walk_rules) as data: prompts, evaluation rows, recovery probes, and an endless corpus.

The rules know no tokenizer and the rows take any, so that a walk can also be given to a model that was not
made for it; only the corpus, which is made by the thousand, asks for a tokenizer that reads a walk number by
number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opd.data.walk_rules import (
    MAX_PATH,
    NUM_EVALUATION_PAIRS,
    NUMBERS,
    REFERENCE_SEED,
    Pair,
    detour_trace,
    distances,
    evaluation_pairs,
    legal_moves,
    optimal_path,
    pick,
    render_path,
    render_prompt,
    score,
    training_pairs,
)
from opd.errors import ConfigError
from opd.protocols import Example
from opd.randomness import generator, permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_FORCED = 2  # random moves that a recovery prompt begins the answer with


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, start: int, goal: int) -> list[int]:
    """The prompt through the chat template, up to where the assistant begins to speak."""
    return _encode(tokenizer, _chat(tokenizer, render_prompt(start, goal)))


def _chat(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(
            f"the walk needs a tokenizer with an eos_token to end answers; {tokenizer.name_or_path!r} "
            f"has eos_token_id {tokenizer.eos_token_id}: set its eos_token"
        )
    return tokenizer.eos_token_id


class _References:
    """One shortest walk per pair, drawn in row order: more prompts extend the set and change no row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], seed: int) -> None:
        rng = random.Random(seed)
        self._examples: list[Example] = []
        for row, (start, goal) in enumerate(pairs):
            completion = render_path(optimal_path(start, goal, rng))
            self._examples.append(
                Example(
                    row,
                    prompt_token_ids(tokenizer, start, goal),
                    [*_encode(tokenizer, completion), _end_id(tokenizer)],
                    fields=_fields(start, goal, completion),
                )
            )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> Example:
        return self._examples[row]


def _fields(start: int, goal: int, completion: str) -> dict[str, int | str]:
    return {"start": start, "goal": goal, "prompt": render_prompt(start, goal), "completion": completion}


def _first(pairs: Sequence[Pair], num_prompts: int, key: str) -> Sequence[Pair]:
    if not 1 <= num_prompts <= len(pairs):
        raise ConfigError(f"{key} must lie in 1..{len(pairs)}, got {num_prompts}")
    return pairs[:num_prompts]


class WalkPrompts(_References):
    """The student's training set: the first `num_prompts` training pairs, a shortest walk each by `seed`.

    Small by default on purpose: with few prompts, fresh rollouts and static references differ most
    (docs/walk.md).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = 512, seed: int = 0) -> None:
        super().__init__(tokenizer, _first(training_pairs(), num_prompts, "data.limit"), REFERENCE_SEED + seed)


class WalkEval(_References):
    """The first `num_prompts` of the 512 evaluation pairs, one shortest walk each, the same in every run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS) -> None:
        super().__init__(tokenizer, _first(evaluation_pairs(), num_prompts, "data.eval_prompts"), REFERENCE_SEED)


class WalkCorpus:
    """`num_rows` fresh walks over the training pairs, to train a model from nothing; row i = f(seed, i).

    Each pass over the 6941 pairs is a permutation of them. With `detour_probability` 0 the walks are shortest
    ones (a base student, which has never seen itself off the path); with 0.15 they are detour traces, whose
    completion_mask is false on the tokens of each detour (a teacher that finds its way back). A trace cut at
    16 numbers has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        seed: int = 0,
        detour_probability: float = 0.0,
    ) -> None:
        if num_rows < 1:
            raise ConfigError(f"num_rows of the walk corpus must be at least 1, got {num_rows}")
        if not 0 <= detour_probability <= 1:
            raise ConfigError(f"detour_probability must lie in [0, 1], got {detour_probability}")
        self._num_rows, self._seed, self._detour_probability = num_rows, seed, detour_probability
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
        completion_ids, mask = self._pieces.completion(path, is_detour, finished=path[-1] == goal)
        return Example(
            row,
            self._pieces.prompt(start, goal),
            completion_ids,
            mask if self._detour_probability else None,
            _fields(start, goal, render_path(path)),
        )

    def _pair(self, row: int) -> Pair:
        pairs = training_pairs()
        pass_number, position = divmod(row, len(pairs))
        if pass_number not in self._orders:
            self._orders[pass_number] = permutation(len(pairs), self._seed, "walk_corpus_order", pass_number)
        return pairs[self._orders[pass_number][position]]


class _Pieces:
    """Prompts and walks put together from the ids of their numbers, each encoded once.

    Raises ConfigError if the tokenizer reads a whole text differently from its numbers one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        mark = render_prompt(NUMBERS[0], NUMBERS[0])
        before, _, after = _chat(tokenizer, mark).partition(mark)
        self._before, self._after = _encode(tokenizer, before), _encode(tokenizer, after)
        self._to = _encode(tokenizer, " to")
        self._first = {number: _encode(tokenizer, f"{number}") for number in NUMBERS}
        self._later = {number: _encode(tokenizer, f" {number}") for number in NUMBERS}
        self._end = _end_id(tokenizer)
        for number in NUMBERS:
            path = [number, *NUMBERS]
            completion_ids, _ = self.completion(path, [False] * len(path), finished=True)
            whole_completion = [*_encode(tokenizer, render_path(path)), self._end]
            whole_prompt = prompt_token_ids(tokenizer, number, number)
            if completion_ids != whole_completion or self.prompt(number, number) != whole_prompt:
                raise ConfigError(
                    f"the walk corpus needs a tokenizer that encodes numbers one by one; at {number}, "
                    f"{tokenizer.name_or_path!r} does not: use opd.data.walk_tokenizer.build_tokenizer"
                )

    def prompt(self, start: int, goal: int) -> list[int]:
        """Equal to prompt_token_ids."""
        return [*self._before, *self._first[start], *self._to, *self._later[goal], *self._after]

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


def recovery_prompts(
    tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS, seed: int = 0
) -> list[Example]:
    """Evaluation prompts whose answer was begun with two random legal moves: does the model come back?

    prompt_ids = the prompt and the forced numbers; there is no completion. fields["prefix"] is the forced
    text ("24 25"): pass it to `score` with the generated text as it comes (" 26 16", its leading space kept).
    Success counts the forced numbers towards the 12 an answer may have. The draw never visits the goal and
    ends where the goal is still in reach within the 12.
    """
    examples = []
    pairs = _first(evaluation_pairs(), num_prompts, "data.eval_prompts")
    for row, (start, goal) in enumerate(pairs):
        forced = _forced_moves(start, goal, generator(seed, "walk_recovery", row))
        prefix = render_path(forced)
        prompt_ids = prompt_token_ids(tokenizer, start, goal) + _encode(tokenizer, prefix)
        examples.append(Example(row, prompt_ids, fields={**_fields(start, goal, ""), "prefix": prefix}))
    return examples


def _forced_moves(start: int, goal: int, rng: np.random.Generator) -> list[int]:
    while True:
        forced, state = [], start
        for _ in range(NUM_FORCED):
            state = pick([move for move in legal_moves(state) if move != goal], rng)
            forced.append(state)
        # One draw in some 200 wanders too far to come back in time.
        if len(forced) + distances(goal)[state] <= MAX_PATH:
            return forced


class WalkTask:
    """The walk as an embedded task: its rows for any tokenizer, and its score."""

    def train(self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = 512, seed: int = 0) -> WalkPrompts:
        """The student's training set."""
        return WalkPrompts(tokenizer, num_prompts, seed)

    def evaluation(self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS) -> WalkEval:
        """The held-out prompts."""
        return WalkEval(tokenizer, num_prompts)

    def probes(
        self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS
    ) -> dict[str, list[Example]]:
        """Further sets to generate on and score, by name; "recovery" measures exposure bias."""
        return {"recovery": recovery_prompts(tokenizer, num_prompts)}

    def score(self, example: Example, text: str, finished: bool) -> dict[str, float]:
        """{"success", "optimal"} of an answer to one row of evaluation or probes.

        `text` is the decoded completion without its end token and nothing stripped; `finished`: the end token
        came.
        """
        fields = example.fields
        return score(fields["start"], fields["goal"], text, finished, fields.get("prefix", ""))
