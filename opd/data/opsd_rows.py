"""A table of drafts, checks and fixes -> the rows of opsd. Cells in, messages out; no files here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from opd.config import Schema
from opd.data.columns import Message
from opd.data.readers import Row

# What tables write where nothing stands, in any case. "NA" is not among them: it can be an answer.
MISSING = frozenset({"", "nan", "none", "null"})

Name = Annotated[str, Field(min_length=1)]


class Stage(Schema):
    """One turn of the chain: the column it stands in, and who speaks."""

    column: Name
    role: Literal["user", "assistant"]
    optional: bool = False


class Columns(Schema):
    """Which column of the table is what. The chain is read in order."""

    id_column: Name | None = "自动编号"
    input_column: Name = "input"
    target_columns: list[Name] = Field(
        default=["final_text", "fix_2_text", "fix_1_text", "fix_text", "generate_text"], min_length=1
    )
    chain: list[Stage] = Field(
        default=[
            Stage(column="generate_text", role="assistant", optional=True),
            Stage(column="validate_text", role="user"),
            Stage(column="fix_text", role="assistant"),
            Stage(column="judge_0_text", role="user"),
            Stage(column="fix_1_text", role="assistant"),
            Stage(column="judge_1_text", role="user"),
            Stage(column="fix_2_text", role="assistant"),
            Stage(column="judge_2_text", role="user"),
        ],
        min_length=1,
    )
    final_column: Name = "final_text"

    def needed(self, include_final_assistant: bool) -> list[str]:
        """The columns that are read, each once, in the order id, input, targets, chain, final."""
        names = [self.input_column, *self.target_columns, *(stage.column for stage in self.chain)]
        names = [self.id_column, *names] if self.id_column is not None else names
        return list(dict.fromkeys([*names, self.final_column] if include_final_assistant else names))


@dataclass
class OpsdRows:
    """The rows kept, in the order of the table, and what was counted on the way.

    `stages`: rows kept whose chain has that column. `duplicate_ids`: {id: rows kept that have it}, from 2 up.
    `empty_privileged`: numbers of the kept rows (from 1, the header not counted) whose chain is empty.
    """

    stages: Counter[str]
    combined: list[dict[str, Any]] = field(default_factory=list)
    total_rows: int = 0
    skipped_missing_input: int = 0
    skipped_missing_target: int = 0
    empty_privileged: list[int] = field(default_factory=list)

    @property
    def student(self) -> list[dict[str, Any]]:
        """What is asked and the answer to learn: id, messages."""
        return [{"id": row["id"], "messages": row["messages"]} for row in self.combined]

    @property
    def teacher(self) -> list[dict[str, Any]]:
        """What is asked and the chain, the teacher's context: id, messages."""
        return [{"id": row["id"], "messages": row["teacher_messages"]} for row in self.combined]

    @property
    def missing_ids(self) -> int:
        """Rows kept whose id is null."""
        return sum(row["id"] is None for row in self.combined)

    @property
    def duplicate_ids(self) -> dict[str, int]:
        """Ids that more than one kept row has."""
        ids = Counter(row["id"] for row in self.combined if row["id"] is not None)
        return {name: count for name, count in ids.items() if count > 1}


def opsd_rows(
    rows: Iterable[Row], columns: Columns, system_prompt: str, *, include_final_assistant: bool = False
) -> OpsdRows:
    """Every row that has an input and a target, as {id, messages, privileged_messages, teacher_messages}.

    messages = system, user, assistant (the target: the first target column that is filled). privileged_messages is the
    chain; teacher_messages = system, user, chain. A row that lacks both input and target is counted under input.
    Every needed column must be in the rows.
    """
    built = OpsdRows(Counter(dict.fromkeys(_stage_names(columns, include_final_assistant), 0)))
    for row in rows:
        built.total_rows += 1
        cells = {name: cell(row.fields[name]) for name in columns.needed(include_final_assistant)}
        asked = cells[columns.input_column]
        target = next((cells[name] for name in columns.target_columns if cells[name]), None)
        if asked is None:
            built.skipped_missing_input += 1
            continue
        if target is None:
            built.skipped_missing_target += 1
            continue
        chain = _chain(cells, columns, include_final_assistant)
        prompt = [_message("system", system_prompt), _message("user", asked)]
        privileged = [message for _, message in chain]
        built.stages.update(name for name, _ in chain)
        if not chain:
            built.empty_privileged.append(row.number)
        built.combined.append(
            {
                "id": cells[columns.id_column] if columns.id_column is not None else None,
                "messages": [*prompt, _message("assistant", target)],
                "privileged_messages": privileged,
                "teacher_messages": [*prompt, *privileged],
            }
        )
    return built


def cell(text: str) -> str | None:
    """The cell without white space at its ends; None where nothing stands in it, or a word for nothing."""
    text = text.strip()
    return None if text.lower() in MISSING else text


def _chain(
    cells: Mapping[str, str | None], columns: Columns, include_final_assistant: bool
) -> list[tuple[str, Message]]:
    """(column, message) up to the first missing cell that is not optional; the final only after a whole chain."""
    chain: list[tuple[str, Message]] = []
    for stage in columns.chain:
        content = cells[stage.column]
        if content is not None:
            chain.append((stage.column, _message(stage.role, content)))
        elif not stage.optional:
            return chain
    final = cells[columns.final_column] if include_final_assistant else None
    return [*chain, (columns.final_column, _message("assistant", final))] if final is not None else chain


def _stage_names(columns: Columns, include_final_assistant: bool) -> list[str]:
    names = [stage.column for stage in columns.chain]
    return [*names, columns.final_column] if include_final_assistant else names


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
