"""One row -> one example of a run, or the reason why it is dropped; and the count of both."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opd.data.chat import render
from opd.data.columns import LAYOUTS, row_refusal, with_system_prompt, without_completion
from opd.data.preference import split_pair
from opd.data.privileged import TeacherPrompt, privileged_prompt
from opd.data.readers import Row
from opd.errors import ConfigError, RowError
from opd.protocols import Example, Needs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A row as the method reads it. Without an example it is dropped, because of `reason`."""

    example: Example | None
    reason: str = ""
    truncated: bool = False
    teacher: TeacherPrompt | None = None  # of a privileged teacher


@dataclass
class Tally:
    """What became of the rows so far."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    blank_lines: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""  # what was wrong with the first row that could not be read
    privileged: Counter[str] = field(default_factory=Counter)

    def note(self, rendered: Rendered) -> None:
        """Count one row."""
        self.rows += 1
        self.kept += rendered.example is not None
        self.truncated += rendered.truncated
        if rendered.example is None:
            self.dropped[rendered.reason] += 1
        if rendered.teacher is not None:
            self.privileged["empty_privileged"] += rendered.teacher.is_empty
            if rendered.teacher.ids is not None:
                self.privileged["privileged_messages_dropped"] += rendered.teacher.num_messages_dropped

    def add(self, other: Tally) -> None:
        """Count what another one counted too."""
        self.rows, self.kept = self.rows + other.rows, self.kept + other.kept
        self.truncated, self.blank_lines = self.truncated + other.truncated, self.blank_lines + other.blank_lines
        self.dropped += other.dropped
        self.first_bad = self.first_bad or other.first_bad
        self.privileged.update(other.privileged)

    def summary(self) -> dict[str, Any]:
        """The counts by name, as they are shown and kept."""
        counts = {"rows": self.rows, "kept": self.kept, "dropped": dict(self.dropped), "truncated": self.truncated}
        told = {"first_bad": self.first_bad} if self.first_bad else {}
        return {**counts, "blank_lines": self.blank_lines, **self.privileged, **told}


@dataclass(frozen=True)
class Rendering:
    """How a run reads its rows; lengths are in tokens, None is no limit.

    A prompt that is too long drops its row, because a prompt without its head is another prompt; a completion
    that is too long loses its end, and with it its stop token. `teacher_tokenizer`: the prompt is also kept as this
    one's template and ids have it. `system_prompt`: the system message of conversations that bring none. `drops_bad`:
    rows that cannot be read are dropped like the too long ones.
    """

    tokenizer: PreTrainedTokenizerBase
    needs: Needs
    stop_ids: frozenset[int]
    max_prompt_length: int | None
    max_completion_length: int | None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    system_prompt: str | None = None
    drops_bad: bool = False

    def tally(self) -> Tally:
        """A count of nothing yet."""
        names = ("empty_privileged", "privileged_messages_dropped") if self.needs.privileged else ()
        return Tally(privileged=Counter(dict.fromkeys(names, 0)))

    def examples(
        self, rows: Iterable[Row | None], columns: Mapping[str, str], where: str, tally: Tally
    ) -> Iterator[Example]:
        """The rows that are kept, each when it is asked for; `tally` grows with what was read.

        `columns` maps our name to the row's ({"prompt": "question"}); naming a column of one layout hides the others,
        so that rows with messages and a question can be read by the question. Fields are the row's own columns and the
        renamed ones. `where` opens the ConfigError, in one line, for a bad row, a column that is not there, or a
        completion that the method needs and the row lacks.
        """
        for row in rows:
            if row is None:
                tally.blank_lines += 1
                continue
            rendered = self.tried(row, columns, where, tally)
            tally.note(rendered)
            if rendered.example is not None:
                yield rendered.example

    def tried(self, row: Row, columns: Mapping[str, str], where: str, tally: Tally) -> Rendered:
        """One row; one that cannot be read is dropped, or refused with the way past it. `tally` keeps the first."""
        try:
            return self(row, columns, where)
        except RowError as error:
            if not self.drops_bad:
                raise RowError(f"{error}; or leave such rows out with data.bad_rows=drop") from None
            tally.first_bad = tally.first_bad or str(error)
            return Rendered(None, "bad")

    def __call__(self, row: Row, columns: Mapping[str, str], where: str) -> Rendered:
        """One row."""
        example, teacher = self._example(row, columns, where)
        if teacher is not None:
            if teacher.ids is None:
                return Rendered(None, str(teacher.reason), teacher=teacher)
            example = replace(example, teacher_prompts={"teacher": teacher.ids})
        if self.max_prompt_length is not None and len(example.prompt_ids) > self.max_prompt_length:
            return Rendered(None, "prompt_too_long", teacher=teacher)
        shortened = _cut(example, self.max_completion_length)
        if not _has_target(shortened):
            return Rendered(None, "no_loss_token", teacher=teacher)
        return Rendered(shortened, truncated=shortened is not example, teacher=teacher)

    def nothing_kept(self, where: str, tally: Tally) -> ConfigError:
        """The error to raise where every row was dropped."""
        if set(tally.dropped) == {"bad"}:
            return ConfigError(f"{where}: none of {tally.rows} rows can be read, the first because: {tally.first_bad}")
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.items())
        limits = f"data.max_prompt_length={self.max_prompt_length}"
        limits += f", data.max_completion_length={self.max_completion_length}"
        if "privileged_too_long" in tally.dropped:
            limits += ", method.max_privileged_length"
        no_limit = set(tally.dropped) == {"empty_privileged"}
        remedy = "fill in what only the teacher is to see" if no_limit else f"raise the limits ({limits})"
        return ConfigError(f"{where}: none of {tally.rows} rows is kept ({reasons}); {remedy}")

    def _example(self, row: Row, columns: Mapping[str, str], where: str) -> tuple[Example, TeacherPrompt | None]:
        place, needs = f"{where}, row {row.number}", self.needs
        named = {ours: _column(row, ours, theirs, place) for ours, theirs in columns.items()}
        fields = {**row.fields, **named}
        read = {name: value for name, value in fields.items() if name not in _hidden(columns)}
        pair = split_pair(read, place, need_rejected=needs.pairs)
        if pair is not None:
            read = {name: value for name, value in read.items() if name not in ("messages", "text")} | pair["chosen"]
        if needs.completions == "unused":
            read = without_completion(read)
        read = with_system_prompt(read, self.system_prompt)
        example = self._rendered(read, needs.turns, row.number, where)
        if pair is not None and needs.pairs:
            rejected = self._rendered(
                with_system_prompt(pair["rejected"], self.system_prompt), "last", row.number, where
            )
            if rejected.prompt_ids != example.prompt_ids:
                problem = (
                    "the chat template renders the prompt otherwise before the rejected answer than before the chosen"
                )
                raise row_refusal(place, problem, "set a chat template that does not look ahead")
            example = replace(example, alternatives={"rejected": rejected.completion_ids or []})
        if needs.completions == "required" and example.completion_ids is None:
            remedy = "add a completion column or an assistant turn, or choose a method that samples its own"
            raise row_refusal(place, "the method needs a completion and the row has none", remedy)
        if needs.completions == "unused":
            example = replace(example, completion_ids=None, completion_mask=None)
        if needs.rollouts and not example.prompt_ids:
            problem, remedy = "running text has no prompt to complete", "give it a `prompt` or `messages` column"
            raise row_refusal(place, problem, remedy)
        if self.teacher_tokenizer is not None:
            prompt = without_completion(read)
            theirs = self._rendered(prompt, needs.turns, row.number, where, tokenizer=self.teacher_tokenizer)
            example = replace(example, teacher_prompts={"teacher": theirs.prompt_ids})
        teacher = None
        if needs.privileged is not None:
            teacher = privileged_prompt(read, example.prompt_ids, self.tokenizer, needs.privileged, place)
        return replace(example, fields=fields), teacher

    def _rendered(self, fields: Mapping[str, Any], turns: Any, row: int, where: str, tokenizer: Any = None) -> Example:
        tokenizer = tokenizer or self.tokenizer
        return render(fields, tokenizer, turns=turns, stop_ids=self.stop_ids, row=row, where=where)


def prompt_identity(example: Example) -> tuple[Any, ...]:
    """What tells two prompts apart; of running text, which has none, two texts."""
    return tuple(example.prompt_ids) or ("text", *(example.completion_ids or ()))


def _column(row: Row, ours: str, theirs: str, place: str) -> Any:
    if theirs not in row.fields:
        names = [str(name) for name in row.fields]
        close = difflib.get_close_matches(theirs, names, n=1)
        remedy = f"did you mean {close[0]}?" if close else "name one of them"
        problem = f"data.columns.{ours}={theirs}: no such column; columns found: {', '.join(names) or 'none'}"
        raise ConfigError(str(row_refusal(place, problem, remedy)))  # of every row: leaving it out would not help
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
