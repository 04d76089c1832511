"""Rows -> examples, all at once: those of a file, what is dropped or cut counted, and some held out for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.readers import Row, first_rows, iterate_rows
from opd.data.rendering import Rendering, prompt_identity
from opd.errors import ConfigError
from opd.protocols import Example, ExampleSet, Needs
from opd.randomness import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FileExamples:
    """Rendered rows, in the order of the file.

    `examples[i].row` is the row's number in the file, which dropped rows and splits leave alone: it is not i.
    `summary` is to be shown and logged: counts named rows, kept, dropped ({reason: count}), truncated,
    duplicates (kept rows whose ids equal an earlier row's) and blank_lines; for a method with a privileged teacher
    also empty_privileged (rows that hold nothing for it) and privileged_messages_dropped (for want of room).
    """

    def __init__(self, examples: Sequence[Example], summary: dict[str, Any]) -> None:
        self._examples = list(examples)
        self.summary = summary

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> Example:
        return self._examples[row]


def load_examples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs: Needs,
    stop_ids: frozenset[int],
    limit: int | None,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    columns: Mapping[str, str] | None = None,
    key: str = "data.path",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> FileExamples:
    """The first `limit` rows of a file (None: all) as this method reads them; `Rendering` says how.

    Raises ConfigError, in one line, for a bad file or row, or no row kept.
    """
    rendering = Rendering(tokenizer, needs, stop_ids, max_prompt_length, max_completion_length, teacher_tokenizer)
    rows = first_rows(iterate_rows(path, key=key), limit)
    return rendered_examples(rows, rendering, columns or {}, f"{key}={path}")


def rendered_examples(
    rows: Iterable[Row | None], rendering: Rendering, columns: Mapping[str, str], where: str
) -> FileExamples:
    """The rows that are kept. Raises ConfigError, in one line that `where` opens, for a bad row or if none is kept."""
    tally = rendering.tally()
    kept = list(rendering.examples(rows, columns, where, tally))
    if not kept:
        raise rendering.nothing_kept(where, tally)
    return FileExamples(kept, {**tally.summary(), "duplicates": num_duplicates(kept)})


def split_evaluation(
    examples: ExampleSet, num_eval: int, seed: int, *, key: str = "data.eval_prompts"
) -> tuple[FileExamples, FileExamples]:
    """(train, eval), each in the order of `examples`; eval is drawn by the seed alone.

    Rows of one prompt (for running text, of one text) stay together, so that nothing trained on is evaluated.
    Where such a group does not fit into what is left of `num_eval` it goes to train, and eval may end a
    little smaller; the summaries have the counts. Raises ConfigError if there are fewer than num_eval + 1
    rows, or if a side would be empty.
    """
    if num_eval < 1:
        raise ConfigError(f"{key}={num_eval}: must be at least 1; leave evaluation out instead")
    if len(examples) < num_eval + 1:
        problem = f"only {len(examples)} rows, and training needs at least one of them"
        raise ConfigError(f"{key}={num_eval}: {problem}; lower it to {max(len(examples) - 1, 0)} or less")
    rows_of: dict[tuple[Any, ...], list[int]] = {}
    for row in permutation(len(examples), seed, "split_evaluation").tolist():
        rows_of.setdefault(prompt_identity(examples[row]), []).append(row)
    chosen: set[int] = set()
    for rows in rows_of.values():
        if len(chosen) + len(rows) <= num_eval:
            chosen.update(rows)
    if not chosen:
        smallest = min(map(len, rows_of.values()))
        problem = f"every prompt has {smallest} rows or more, and rows of one prompt stay together"
        remedy = f"raise it to {smallest}" if len(rows_of) > 1 else "add other prompts, there is only one"
        raise ConfigError(f"{key}={num_eval}: {problem}; {remedy}")
    train = [examples[row] for row in range(len(examples)) if row not in chosen]
    evaluation = [examples[row] for row in sorted(chosen)]
    return _part(train), _part(evaluation)


def num_duplicates(examples: Sequence[Example]) -> int:
    """How many of them have the ids of an earlier one."""
    distinct = {
        (tuple(e.prompt_ids), tuple(e.completion_ids or ()), *map(tuple, e.alternatives.values())) for e in examples
    }
    return len(examples) - len(distinct)


def _part(examples: Sequence[Example]) -> FileExamples:
    summary = {"rows": len(examples), "kept": len(examples), "dropped": {}, "truncated": 0}
    return FileExamples(examples, {**summary, "duplicates": num_duplicates(examples), "blank_lines": 0})
