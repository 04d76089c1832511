"""The prompt that a teacher reads in place of the student's: it holds what the student does not see."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.data.chat import render_messages
from opd.data.columns import Conversation, Message, read_columns, read_messages, row_refusal
from opd.errors import ConfigError
from opd.protocols import Privileged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("privileged_messages", "privileged")


@dataclass(frozen=True)
class TeacherPrompt:
    """Ids None: the row is not to be used, because of `reason`."""

    ids: list[int] | None
    reason: str | None = None
    is_empty: bool = False  # the row holds nothing that the student does not see
    num_messages_dropped: int = 0  # privileged messages that the limit left no room for


def privileged_prompt(
    fields: Mapping[str, Any],
    student_prompt_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: Privileged,
    place: str,
) -> TeacherPrompt:
    """What the teacher reads before the row's completion.

    The row's prompt, then the messages of `privileged_messages`, then, if the assistant's is their last, the bridge;
    behind them the assistant's turn is opened. A string (in `privileged`, or in that column) is folded into the last
    user message of the prompt instead. teacher_prompt "full": `teacher_messages`, without an assistant message at their
    end. layout "concat": the student's prompt with its opened turn, the privileged messages rendered by themselves (a
    string as a user's), and no turn opened behind these; it is no conversation that any template would write.

    Beyond `max_length` the oldest privileged messages are dropped, never the row's prompt; of `teacher_messages` that
    do not begin with the row's prompt, none. Where not even the last one fits the row is not to be used.

    `place` says which row of which file; it opens the ConfigError, which is one line: for a row without the column,
    for bad messages, and, unless `on_empty` says otherwise, for a row that holds nothing privileged.
    """
    content = read_columns(fields, "last", place)
    assert isinstance(content, Conversation)
    prompt = content.messages[: content.loss_turns[0]] if content.loss_turns else content.messages
    column, choices = (_full if settings.teacher_prompt == "full" else _added)(fields, prompt, settings, place)
    if not choices:
        return _without(column, student_prompt_ids, settings, place)
    is_joined = settings.layout == "concat"
    for num_dropped, messages in enumerate(choices):
        ids = render_messages(messages, tokenizer, place, open_turn=not is_joined)
        ids = student_prompt_ids + ids if is_joined else ids
        if settings.max_length is None or len(ids) <= settings.max_length:
            return TeacherPrompt(ids, num_messages_dropped=num_dropped)
    return TeacherPrompt(None, "privileged_too_long")


def _added(
    fields: Mapping[str, Any], prompt: list[Message], settings: Privileged, place: str
) -> tuple[str, list[list[Message]]]:
    """The column, and the messages to render: all, then ever fewer privileged ones. Nothing: it is empty."""
    column = next((name for name in COLUMNS if name in fields), None)
    if column is None:
        raise _no_column(fields, " or ".join(COLUMNS), place)
    value, is_joined = fields[column], settings.layout == "concat"
    if isinstance(value, str):
        if not value.strip():
            return column, []
        return column, [[{"role": "user", "content": value}] if is_joined else _folded(prompt, value, settings, place)]
    messages = _messages(value, column, place)
    if is_joined:
        return column, [messages[first:] for first in range(len(messages))]
    needs_bridge = settings.bridge is not None and messages and messages[-1]["role"] == "assistant"
    bridge: list[Message] = [{"role": "user", "content": settings.bridge}] if needs_bridge else []
    return column, [prompt + messages[first:] + bridge for first in range(len(messages))]


def _full(
    fields: Mapping[str, Any], prompt: list[Message], settings: Privileged, place: str
) -> tuple[str, list[list[Message]]]:
    """As `_added`, of the row's own teacher_messages; as empty counts what only repeats the prompt."""
    del settings
    column = "teacher_messages"
    if column not in fields:
        raise _no_column(fields, column, place)
    messages = _messages(fields[column], column, place)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages in ([], prompt):
        return column, []
    if messages[: len(prompt)] != prompt:
        return column, [messages]
    return column, [prompt + messages[first:] for first in range(len(prompt), len(messages))]


def _messages(value: Any, column: str, place: str) -> list[Message]:
    """No messages, or only blank ones, are none."""
    messages = [] if value in (None, [], ()) else read_messages(value, column, place)
    return messages if any(message["content"].strip() for message in messages) else []


def _folded(prompt: list[Message], privileged: str, settings: Privileged, place: str) -> list[Message]:
    users = [k for k, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        remedy = "add a user turn, or write privileged_messages"
        raise row_refusal(place, "no user message to fold the privileged text into", remedy)
    last = users[-1]
    parts = {"user": prompt[last]["content"], "privileged": privileged}
    # At once: what is filled in may itself hold "{privileged}", or any other brace.
    content = re.sub(r"\{(user|privileged)\}", lambda found: parts[found[1]], settings.template)
    return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]


def _without(column: str, student_prompt_ids: list[int], settings: Privileged, place: str) -> TeacherPrompt:
    if settings.on_empty == "error":
        problem = f"{column} holds nothing that the student does not see"
        raise row_refusal(place, problem, "fill it in, or set method.on_empty_privileged to keep or skip")
    if settings.on_empty == "skip":
        return TeacherPrompt(None, "empty_privileged", is_empty=True)
    return TeacherPrompt(student_prompt_ids, is_empty=True)


def _no_column(fields: Mapping[str, Any], wanted: str, place: str) -> ConfigError:
    found = ", ".join(map(str, fields)) or "none"
    remedy = "name yours in data.columns, or choose a method without a privileged teacher"
    return row_refusal(place, f"no column {wanted}; columns found: {found}", remedy)
