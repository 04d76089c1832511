"""A file of rows -> examples: columns renamed, rows rendered, what is dropped or cut counted."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.chat import render
from opd.data.columns import LAYOUTS, row_refusal, without_completion
from opd.data.preference import split_pair
from opd.data.privileged import TeacherPrompt, privileged_prompt
from opd.data.readers import Row, read_rows
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
    """The file's rows as this method reads them; lengths are in tokens, None is no limit.

    A prompt that is too long drops its row, because a prompt without its head is another prompt; a completion
    that is too long loses its end, and with it its stop token. `columns` maps our name to the file's
    ({"prompt": "question"}); naming a column of one layout hides the others, so that a file with messages and
    a question can be read by the question. Fields are the row's own columns and the renamed ones.
    `teacher_tokenizer`: the prompt is also kept as this one's template and ids have it.

    Raises ConfigError, in one line, for a bad file or row, a column that is not there, a completion that the
    method needs and the row lacks, or no row kept.
    """
    rows = read_rows(path, limit=limit, key=key)
    where = f"{key}={path}"
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    truncated = 0
    privileged = Counter(empty_privileged=0, privileged_messages_dropped=0) if needs.privileged else Counter()
    for row in rows:
        example, teacher = _example(row, tokenizer, teacher_tokenizer, needs, stop_ids, columns or {}, where)
        if teacher is not None:
            privileged["empty_privileged"] += teacher.is_empty
            if teacher.ids is None:
                dropped[str(teacher.reason)] += 1
                continue
            privileged["privileged_messages_dropped"] += teacher.num_messages_dropped
            example = replace(example, teacher_prompts={"teacher": teacher.ids})
        if max_prompt_length is not None and len(example.prompt_ids) > max_prompt_length:
            dropped["prompt_too_long"] += 1
            continue
        shortened = _cut(example, max_completion_length)
        if not _has_target(shortened):
            dropped["no_loss_token"] += 1
            continue
        truncated += shortened is not example
        kept.append(shortened)
    if not kept:
        raise _nothing_kept(where, len(rows), dropped, max_prompt_length, max_completion_length)
    summary = {
        "rows": len(rows),
        "kept": len(kept),
        "dropped": dict(dropped),
        "truncated": truncated,
        "duplicates": _num_duplicates(kept),
        "blank_lines": rows.blank_lines,
        **privileged,
    }
    return FileExamples(kept, summary)


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
        rows_of.setdefault(_prompt_identity(examples[row]), []).append(row)
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


def _example(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    needs: Needs,
    stop_ids: frozenset[int],
    columns: Mapping[str, str],
    where: str,
) -> tuple[Example, TeacherPrompt | None]:
    place = f"{where}, row {row.number}"
    named = {ours: _column(row, ours, theirs, place) for ours, theirs in columns.items()}
    fields = {**row.fields, **named}
    read = {name: value for name, value in fields.items() if name not in _hidden(columns)}
    pair = split_pair(read, place, need_rejected=needs.pairs)
    if pair is not None:
        read = {name: value for name, value in read.items() if name not in ("messages", "text")} | pair["chosen"]
    if needs.completions == "unused":
        read = without_completion(read)
    example = render(read, tokenizer, turns=needs.turns, stop_ids=stop_ids, row=row.number, where=where)
    if pair is not None and needs.pairs:
        rejected = render(pair["rejected"], tokenizer, turns="last", stop_ids=stop_ids, row=row.number, where=where)
        if rejected.prompt_ids != example.prompt_ids:
            problem = "the chat template renders the prompt otherwise before the rejected answer than before the chosen"
            raise row_refusal(place, problem, "set a chat template that does not look ahead")
        example = replace(example, alternatives={"rejected": rejected.completion_ids or []})
    if needs.completions == "required" and example.completion_ids is None:
        remedy = "add a completion column or an assistant turn, or choose a method that samples its own"
        raise row_refusal(place, "the method needs a completion and the row has none", remedy)
    if needs.completions == "unused":
        example = replace(example, completion_ids=None, completion_mask=None)
    if teacher_tokenizer is not None:
        prompt = without_completion(read)
        theirs = render(prompt, teacher_tokenizer, turns=needs.turns, stop_ids=stop_ids, row=row.number, where=where)
        example = replace(example, teacher_prompts={"teacher": theirs.prompt_ids})
    teacher = None
    if needs.privileged is not None:
        teacher = privileged_prompt(read, example.prompt_ids, tokenizer, needs.privileged, place)
    return replace(example, fields=fields), teacher


def _column(row: Row, ours: str, theirs: str, place: str) -> Any:
    if theirs not in row.fields:
        names = [str(name) for name in row.fields]
        close = difflib.get_close_matches(theirs, names, n=1)
        remedy = f"did you mean {close[0]}?" if close else "name one of them"
        problem = f"data.columns.{ours}={theirs}: no such column; columns found: {', '.join(names) or 'none'}"
        raise row_refusal(place, problem, remedy)
    return row.fields[theirs]


def _hidden(columns: Mapping[str, str]) -> frozenset[str]:
    named = [layout for layout in LAYOUTS if layout & columns.keys()]
    return frozenset().union(*LAYOUTS).difference(*named) if named else frozenset()


def _cut(example: Example, max_completion_length: int | None) -> Example:
    ids, mask = example.completion_ids, example.completion_mask
    answers = [ids or [], *example.alternatives.values()]
    if ids is None or max_completion_length is None or max(map(len, answers)) <= max_completion_length:
        return example
    shorter = mask[:max_completion_length] if mask is not None else None
    others = {kind: other[:max_completion_length] for kind, other in example.alternatives.items()}
    return replace(example, completion_ids=ids[:max_completion_length], completion_mask=shorter, alternatives=others)


def _has_target(example: Example) -> bool:
    """Whether a loss token is left that something predicts: nothing predicts token 0 of a sequence."""
    if example.completion_ids is None:
        return True
    mask = example.completion_mask or [True] * len(example.completion_ids)
    return any(mask[0 if example.prompt_ids else 1 :])


def _num_duplicates(examples: Sequence[Example]) -> int:
    distinct = {
        (tuple(e.prompt_ids), tuple(e.completion_ids or ()), *map(tuple, e.alternatives.values())) for e in examples
    }
    return len(examples) - len(distinct)


def _prompt_identity(example: Example) -> tuple[Any, ...]:
    # Only running text has no prompt ids; as prompts they would all be the same.
    return tuple(example.prompt_ids) or ("text", *(example.completion_ids or ()))


def _part(examples: Sequence[Example]) -> FileExamples:
    summary = {"rows": len(examples), "kept": len(examples), "dropped": {}, "truncated": 0}
    return FileExamples(examples, {**summary, "duplicates": _num_duplicates(examples), "blank_lines": 0})


def _nothing_kept(
    where: str,
    rows: int,
    dropped: Counter[str],
    max_prompt_length: int | None,
    max_completion_length: int | None,
) -> ConfigError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    limits = f"data.max_prompt_length={max_prompt_length}, data.max_completion_length={max_completion_length}"
    if "privileged_too_long" in dropped:
        limits += ", method.max_privileged_length"
    no_limit = set(dropped) == {"empty_privileged"}
    remedy = "fill in what only the teacher is to see" if no_limit else f"raise the limits ({limits})"
    return ConfigError(f"{where}: none of {rows} rows is kept ({reasons}); {remedy}")
