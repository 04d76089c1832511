"""The rows as training will see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.config import Config
from opd.data import DataSet, StreamedExamples
from opd.loading import Texts, num_steps
from opd.preflight.findings import Finding, Severity
from opd.preflight.rows import check_rows
from opd.protocols import Example, ExampleSet, Method, Needs
from opd.training_arguments import warmup_steps

_MOST_ROWS = 2000  # that are looked at
_STREAMED_ROWS = 256  # of a stream
_MUCH = 0.1  # of the rows lost or cut
_MANY = 0.01  # of the rows empty or alike
_TAIL = 8  # ids by which two prompts are told apart before they are compared

# Why rows are dropped: the key that did it, and whether that is to be heeded where it takes many.
_DROPPED = {
    "prompt_too_long": "data.max_prompt_length={data.max_prompt_length}",
    "no_loss_token": "data.max_completion_length={data.max_completion_length}",
    "privileged_too_long": "method.max_privileged_length={method.max_privileged_length}",
    "empty_privileged": "method.on_empty_privileged={method.on_empty_privileged}",
    "bad": "data.bad_rows={data.bad_rows}",
    "chosen_is_rejected": "data.variant={data.variant}",
}
_WANTED = ("chosen_is_rejected",)  # pairs without a preference are not meant to stay


def check_data(config: Config, method: Method, texts: Texts) -> list[Finding]:
    """Counts, lengths, duplicates, the split, and the rows themselves; at most two thousand rows are looked at.

    That no prompt is both trained on and evaluated is looked up in all of them, but in a stream.
    """
    data, needs = texts.data, method.needs
    rows = _spread(data.train)
    looked = f"{len(rows):,} rows" + (f" looked at of {len(data.train):,}" if len(rows) < len(data.train) else "")
    return [
        *_check_steps(config, data),
        *_check_lost(config, data.summary),
        *_check_sources(data.summary.get("sources", {})),
        *_check_lengths(config, rows, looked),
        *_check_repeats(data.summary, rows, looked),
        *_check_leakage(data, rows),
        *_check_answers(rows, looked, texts.vocabulary.stop_ids),
        *_check_columns(needs, rows),
        *check_rows(config, needs, texts, rows, looked),
    ]


def _spread(examples: ExampleSet) -> list[Example]:
    """All rows, or as many from everywhere as are looked at; of a stream those at its head."""
    size = len(examples)
    if isinstance(examples, StreamedExamples):
        head = [examples[number] for number in range(min(size, _STREAMED_ROWS))]
        return list({row.row: row for row in head}.values())  # a stream begins again where its data ends
    most = min(size, _MOST_ROWS)
    return [examples[number * size // most] for number in range(most)]


def _check_steps(config: Config, data: DataSet) -> list[Finding]:
    rows, batch, steps = len(data.train), config.train.batch_size, num_steps(config, data)
    if steps < 1 or rows < batch:
        what = f"train.batch_size={batch}: {rows} training rows make {steps} steps"
        why = "a training without a step, or with a step that is not full, ends as it began"
        return [Finding("data.steps", "error", what, why, f"lower it to {rows} or less")]
    passes = "streamed" if isinstance(data.train, StreamedExamples) else f"{steps * batch / rows:.2f} passes"
    what = f"{rows:,} training rows, {steps:,} steps of {batch}: {passes}"
    findings = [Finding("data.steps", "note", what)]
    if warmup_steps(config.train, steps) >= steps:
        key = "train.warmup_steps" if config.train.warmup_steps else "train.warmup_ratio"
        what = f"{key}={config.at(key)}: all {steps:,} steps are warm-up"
        why = "none of them has train.learning_rate"
        findings.append(Finding("data.warmup", "warning", what, why, "lower it, or raise train.max_steps"))
    return findings


def _check_lost(config: Config, summary: dict[str, Any]) -> list[Finding]:
    """What was dropped and cut on the way here, by reason."""
    rows, findings = max(int(summary.get("rows") or 0), 1), []
    for reason, count in summary.get("dropped", {}).items():
        key = _key(config, _DROPPED.get(reason, "data.path={data.path}"))
        if count:
            what = f"{key}: {count:,} of {rows:,} rows dropped ({reason}, {count / rows:.0%})"
            if reason in _WANTED:
                findings.append(Finding("data.dropped", "note", what))
                continue
            severity: Severity = "warning" if count > _MUCH * rows else "note"
            why = "what is left is another data set, of its short rows, say"
            remedy = summary["first_bad"] if reason == "bad" else "raise the limit, or mend the rows"
            findings.append(Finding("data.dropped", severity, what, why, remedy))
    for name, what in (("truncated", "answers"), ("truncated_responses", "stored responses")):
        if count := summary.get(name, 0):
            said = f"data.max_completion_length={config.data.max_completion_length}: {count:,} of {rows:,} {what} cut "
            said += f"({count / rows:.0%})"
            why = "a cut answer has no end, so the student learns to go on"
            severity = "warning" if count > _MUCH * rows else "note"
            findings.append(Finding("data.truncated", severity, said, why, "raise it, or leave long rows out"))
    for name, key in (
        ("empty_privileged", "on_empty_privileged"),
        ("privileged_messages_dropped", "max_privileged_length"),
    ):
        if count := summary.get(name, 0):
            said = f"method.{key}={getattr(config.method, key, None)}: {name} {count:,} of {rows:,} rows"
            severity = "warning" if count > _MUCH * rows else "note"
            why = "where the teacher sees no more than the student, it teaches nothing"
            findings.append(Finding("data.privileged", severity, said, why, "fill the column in, or raise the limit"))
    return findings


def _check_sources(sources: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What each part of a mixture gave."""
    findings = []
    for name, told in sources.items():
        rows, used = told.get("rows", 0), told.get("used", 0)
        what = f"data.sources.{name}: {used:,} rows used, {told.get('left_out', 0):,} left over"
        lost = ", ".join(f"{reason} {count:,}" for reason, count in told.get("dropped", {}).items() if count)
        what += f"; of {rows:,} read dropped: {lost}" if lost else ""
        severity: Severity = "error" if not used else "note" if told["kept"] > (1 - _MUCH) * rows else "warning"
        why = "" if severity == "note" else "the mixture is not the one that was asked for"
        remedy = "" if severity == "note" else "raise the limits, or leave the source out"
        findings.append(Finding("data.sources", severity, what, why, remedy))
    return findings


def _key(config: Config, pattern: str) -> str:
    name, _, key = pattern.partition("=")
    section, _, field = key.strip("{}").partition(".")
    return f"{name}={getattr(getattr(config, section), field, None)}"


def _check_lengths(config: Config, rows: Sequence[Example], looked: str) -> list[Finding]:
    """The half, the nineteen twentieths and the longest, beside the limit."""
    answers = [row.completion_ids for row in rows if row.completion_ids is not None]
    said = [
        f"{name} {_percentile(lengths, 50)} / {_percentile(lengths, 95)} / {max(lengths)} tokens (limit {limit})"
        for name, lengths, limit in (
            ("prompts", [len(row.prompt_ids) for row in rows], config.data.max_prompt_length),
            ("answers", [len(answer) for answer in answers], config.data.max_completion_length),
        )
        if lengths
    ]
    return [Finding("data.lengths", "note", f"half / 95 % / the longest of {looked}: {', '.join(said)}")]


def _percentile(lengths: Sequence[int], percent: int) -> int:
    return sorted(lengths)[(len(lengths) - 1) * percent // 100]


def _check_repeats(summary: dict[str, Any], rows: Sequence[Example], looked: str) -> list[Finding]:
    """Rows that are the same, and prompts with several answers."""
    whole = Counter(
        (tuple(row.prompt_ids), tuple(row.completion_ids or ()), *map(tuple, row.alternatives.values())) for row in rows
    )
    prompts = Counter(prompt for prompt, *_ in whole if prompt)
    findings, same, size = [], len(rows) - len(whole), len(rows)
    counted, kept = summary.get("duplicates", 0), summary.get("kept", size)
    if counted * size > same * kept:  # in all rows a repetition is found that those looked at need not hold
        same, size, looked = counted, kept, f"{kept:,} rows"
    if same:
        what = f"{same:,} of {looked} ({same / size:.0%}) repeat a row from prompt to answer"
        severity: Severity = "warning" if same > _MANY * size else "note"
        remedy = "remove the repetitions from the data"
        findings.append(Finding("data.duplicates", severity, what, "they count twice in every mean", remedy))
    if several := sum(prompts.values()) - len(prompts):
        what = f"{several:,} of {looked} repeat a prompt with another answer"
        findings.append(Finding("data.prompts", "note", what, "they stay on one side of the split"))
    return findings


def _check_leakage(data: DataSet, rows: Sequence[Example]) -> list[Finding]:
    held_out = {_identity(row) for row in data.evaluation}
    if not held_out:
        return []
    near = {(len(ids), ids[-_TAIL:]) for ids in held_out}
    leaked: set[tuple[int, ...]] = set()
    for row in rows if isinstance(data.train, StreamedExamples) else _all(data.train):
        ids = row.prompt_ids or row.completion_ids or []
        if (len(ids), tuple(ids[-_TAIL:])) in near and (whole := tuple(ids)) in held_out:
            leaked.add(whole)
    if not leaked:
        return []
    what = f"{len(leaked):,} of {len(held_out):,} evaluation prompts are trained on too"
    why = "evaluation would measure what was learnt by heart"
    remedy = "leave them out of data.eval_path or data.eval_split, or hold rows out with data.eval_prompts"
    return [Finding("data.leakage", "error", what, why, remedy)]


def _all(examples: ExampleSet) -> Iterator[Example]:
    return (examples[number] for number in range(len(examples)))


def _identity(row: Example) -> tuple[int, ...]:
    """Its prompt; of running text, which has none, the text."""
    return tuple(row.prompt_ids or row.completion_ids or ())


def _check_answers(rows: Sequence[Example], looked: str, stops: frozenset[int]) -> list[Finding]:
    """Answers that say nothing, and pairs that prefer nothing."""
    answered = [row for row in rows if row.completion_ids is not None]
    empty = sum(all(token in stops for token in row.completion_ids or []) for row in answered)
    pairs = [row for row in answered if "rejected" in row.alternatives]
    equal = sum(row.completion_ids == row.alternatives["rejected"] for row in pairs)
    findings = []
    for count, check, what, why, remedy in (
        (empty, "data.empty", "answers are empty", "they teach to say nothing", "remove these rows"),
        (
            equal,
            "data.pairs",
            "pairs have the same tokens as chosen and rejected",
            "they prefer nothing",
            "remove these rows; where both were cut, raise data.max_completion_length",
        ),
    ):
        if count:
            severity: Severity = "warning" if count > _MANY * len(rows) else "note"
            findings.append(Finding(check, severity, f"{count:,} {what} ({looked})", why, remedy))
    return findings


def _check_columns(needs: Needs, rows: Sequence[Example]) -> list[Finding]:
    """Columns that opd knows and this method does not read."""
    there = {name for row in rows[:64] for name in row.fields}
    unread = {"rejected"} if not needs.pairs else set()
    unread |= {"privileged", "privileged_messages", "teacher_messages"} if needs.privileged is None else set()
    unread |= {"completion"} if needs.completions == "unused" else set()
    if found := sorted(there & unread):
        what = f"columns that the method does not learn from: {', '.join(found)}"
        return [Finding("data.columns", "note", what)]
    return []
