"""The number walk (walk_rules) as data: prompts and answers, evaluation rows, and probes, in four variants.

The rules know no tokenizer and the rows take any, so that a walk can also be given to a model that was not made for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from opd.data.walk_preferences import bold_path, bold_share, longer_path, timid_path
from opd.data.walk_rules import (
    MAX_PATH,
    NUM_EVALUATION_PAIRS,
    REFERENCE_SEED,
    Pair,
    distances,
    evaluation_pairs,
    legal_moves,
    optimal_path,
    pick,
    render_path,
    score,
    training_pairs,
)
from opd.data.walk_text import encode, end_id, prompt_token_ids, walk_fields
from opd.errors import ConfigError
from opd.protocols import Example
from opd.randomness import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Variant = Literal["plain", "bold", "short", "hint"]
"""What a row holds beside prompt and reference: nothing; a pair, big moves or few moves first; the teacher's hint."""

PAIRED: tuple[Variant, ...] = ("bold", "short")
NUM_FORCED = 2  # random moves that a recovery prompt begins the answer with


class _Rows:
    """One row per pair, drawn in row order: more prompts extend the set and change no row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        seed: int,
        variant: Variant,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        rng = random.Random(seed)
        self._examples: list[Example] = []
        for row, (start, goal) in enumerate(pairs):
            reference = optimal_path(start, goal, rng)
            chosen, rejected = _answers(variant, start, goal, reference, generator(seed, "walk_longer", row))
            fields, alternatives = walk_fields(start, goal, render_path(chosen)), {}
            if rejected:
                fields |= {"chosen": render_path(chosen), "rejected": render_path(rejected)}
                alternatives["rejected"] = _answer_ids(tokenizer, rejected)
            teacher_prompts = {}
            if variant == "hint" or teacher_tokenizer is not None:
                hint = chosen if variant == "hint" else ()
                teacher_prompts["teacher"] = prompt_token_ids(teacher_tokenizer or tokenizer, start, goal, hint)
            self._examples.append(
                Example(
                    row,
                    prompt_token_ids(tokenizer, start, goal),
                    _answer_ids(tokenizer, chosen),
                    alternatives=alternatives,
                    teacher_prompts=teacher_prompts,
                    fields=fields,
                )
            )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> Example:
        return self._examples[row]


def _answers(
    variant: Variant, start: int, goal: int, reference: list[int], rng: np.random.Generator
) -> tuple[list[int], list[int] | None]:
    """The answer to a prompt, and the one that it is preferred to, if the variant has one."""
    if variant == "bold":
        chosen, rejected = bold_path(start, goal), timid_path(start, goal)
        return chosen, rejected if rejected != chosen else None
    if variant == "short":
        return reference, longer_path(start, goal, rng)
    return reference, None


def _answer_ids(tokenizer: PreTrainedTokenizerBase, path: Sequence[int]) -> list[int]:
    return [*encode(tokenizer, render_path(path)), end_id(tokenizer)]


def _first(pairs: Sequence[Pair], num_prompts: int, key: str) -> Sequence[Pair]:
    if not 1 <= num_prompts <= len(pairs):
        raise ConfigError(f"{key} must lie in 1..{len(pairs)}, got {num_prompts}")
    return pairs[:num_prompts]


class WalkPrompts(_Rows):
    """The student's training set: the first `num_prompts` training pairs, a shortest walk each by `seed`.

    Small by default on purpose: with few prompts, fresh rollouts and static references differ most (docs/walk.md).

    Variant "bold" takes the bold walk as answer and the timid one as "rejected", of the same number of moves, and drops
    the prompts where the two are one. "short" rejects a longer walk that succeeds too. "hint" gives the teacher the
    answer in its prompt. `teacher_tokenizer` is the teacher's, where that is another one than the student's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompts: int = 512,
        seed: int = 0,
        *,
        variant: Variant = "plain",
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        pairs = _first(training_pairs(), num_prompts, "data.limit")
        super().__init__(tokenizer, pairs, REFERENCE_SEED + seed, variant, teacher_tokenizer)
        if variant in PAIRED:
            self._examples = [example for example in self._examples if example.alternatives]


class WalkEval(_Rows):
    """The first `num_prompts` of the 512 evaluation pairs, the same rows in every run.

    No prompt is dropped, whatever the variant; in "bold", a row whose bold walk is the timid one has no alternative.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompts: int = NUM_EVALUATION_PAIRS,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        variant: Variant = "plain",
    ) -> None:
        pairs = _first(evaluation_pairs(), num_prompts, "data.eval_prompts")
        super().__init__(tokenizer, pairs, REFERENCE_SEED, variant, teacher_tokenizer)


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
        prompt_ids = prompt_token_ids(tokenizer, start, goal) + encode(tokenizer, prefix)
        examples.append(Example(row, prompt_ids, fields={**walk_fields(start, goal, ""), "prefix": prefix}))
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


def hinted_prompts(tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS) -> list[Example]:
    """Evaluation prompts with a shortest walk shown: what a teacher that reads the hint can do."""
    rows = WalkEval(tokenizer, num_prompts, variant="hint")
    return [Example(row.row, row.teacher_prompts["teacher"], fields=row.fields) for row in rows]


class WalkTask:
    """The walk as an embedded task: its rows for any tokenizer, and its score."""

    def __init__(self, variant: Variant = "plain") -> None:
        self._variant: Variant = variant

    def train(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompts: int = 512,
        seed: int = 0,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> WalkPrompts:
        """The student's training set."""
        return WalkPrompts(tokenizer, num_prompts, seed, variant=self._variant, teacher_tokenizer=teacher_tokenizer)

    def evaluation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompts: int = NUM_EVALUATION_PAIRS,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> WalkEval:
        """The held-out prompts."""
        return WalkEval(tokenizer, num_prompts, teacher_tokenizer, variant=self._variant)

    def probes(
        self, tokenizer: PreTrainedTokenizerBase, num_prompts: int = NUM_EVALUATION_PAIRS
    ) -> dict[str, list[Example]]:
        """Further sets to generate on and score, by name.

        "recovery" measures exposure bias; "hinted", of the variant with hints, what the hint is worth.
        """
        probes = {"recovery": recovery_prompts(tokenizer, num_prompts)}
        if self._variant == "hint":
            probes["hinted"] = hinted_prompts(tokenizer, num_prompts)
        return probes

    def score(self, example: Example, text: str, finished: bool) -> dict[str, float]:
        """{"success", "optimal"} of an answer to one row of evaluation or probes; "bold" too in that variant.

        `text` is the decoded completion without its end token and nothing stripped; `finished`: the end token
        came. An answer without a choice between optimal moves has no "bold": the metric is the mean over those that do.
        """
        start, goal, prefix = (example.fields.get(name, "") for name in ("start", "goal", "prefix"))
        found = score(start, goal, text, finished, prefix)
        if self._variant == "bold" and not prefix:
            share = bold_share(start, goal, text)
            found |= {} if share is None else {"bold": share}
        return found
