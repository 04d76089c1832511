"""A row's columns -> one conversation, or one running text. No tokenizer is asked yet."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opd.errors import ConfigError, RowError

LAYOUTS = (
    frozenset({"messages"}),
    frozenset({"prompt", "completion"}),
    frozenset({"prompt", "chosen", "rejected"}),
    frozenset({"text"}),
)
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "text")
ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_NAMES_ELSEWHERE = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them are loss tokens: assistant turns, in order. No turn: only a prompt."""

    messages: list[Message]
    loss_turns: list[int]


@dataclass(frozen=True)
class RunningText:
    """Text without a prompt."""

    text: str


def read_columns(fields: Mapping[str, Any], turns: Literal["all", "last"], place: str) -> Conversation | RunningText:
    """The row as the first it has of `messages`, `prompt` (with or without `completion`) and `text`.

    `place` says which row of which file; it opens the ConfigError, which is one line.
    """
    if "messages" in fields:
        messages = read_messages(fields["messages"], "messages", place)
        first = 0
    elif "prompt" in fields:
        messages, first = _prompt_and_completion(fields, place)
    elif "text" in fields:
        return _running_text(fields["text"], turns, place)
    else:
        raise _no_known_column(fields, place)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if turns == "last":
        assistant = [i for i in assistant if i == len(messages) - 1]
    _check_contents(messages, assistant, place)
    return Conversation(messages, assistant)


def without_completion(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The row less its dataset completion: no `completion`, no last assistant message in `messages`.

    For methods that sample their own: what nobody reads cannot then be a reason to refuse the row.
    """
    kept = {name: value for name, value in fields.items() if name != "completion"}
    messages = kept.get("messages")
    if isinstance(messages, list | tuple) and messages and isinstance(messages[-1], Mapping):
        is_answered = messages[-1].get("role") == "assistant"
        kept["messages"] = list(messages[:-1] if is_answered else messages)
    return kept


def with_system_prompt(fields: Mapping[str, Any], system_prompt: str | None) -> dict[str, Any]:
    """The row with this system message before a conversation that brings none; `prompt` may be a string.

    A conversation that says nothing stays as it is: it is to be refused, not to be answered.
    """
    row = dict(fields)
    if system_prompt is None:
        return row
    for column in ("messages", "prompt", "teacher_messages"):
        value = row.get(column)
        messages = [{"role": "user", "content": value}] if isinstance(value, str) and column == "prompt" else value
        if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
            continue
        says_something = any(str(message.get("content") or "").strip() for message in messages)
        if says_something and messages[0].get("role") not in ("system", "developer"):
            row[column] = [{"role": "system", "content": system_prompt}, *messages]
    return row


def row_refusal(place: str, problem: str, remedy: str) -> RowError:
    """The error to raise for a row, in one line whatever line breaks its values hold."""
    return RowError(" ".join(f"{place}: {problem}; {remedy}".split()))


def _prompt_and_completion(fields: Mapping[str, Any], place: str) -> tuple[list[Message], int]:
    prompt, completion = fields["prompt"], fields.get("completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = read_messages(prompt, "prompt", place)
    if prompt[-1]["role"] == "assistant":
        problem = "prompt ends in an assistant turn, and the model would add a second"
        raise row_refusal(place, problem, "end it in the user's turn, or name the column messages")
    if completion is None:
        return prompt, len(prompt)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    completion = read_messages(completion, "completion", place)
    if completion[-1]["role"] != "assistant":
        problem = f"completion ends in a turn of the {completion[-1]['role']}"
        raise row_refusal(place, problem, "end it in an assistant turn")
    return prompt + completion, len(prompt)


def read_messages(value: Any, column: str, place: str) -> list[Message]:
    """The messages in a column. Raises ConfigError, in one line that `place` opens, for anything else and for none."""
    if value is None:
        raise row_refusal(place, f"{column} is None", "fill it in or remove the row")
    if not isinstance(value, list | tuple):
        kinds = "a list of messages" if "messages" in column else "a string or a list of messages"
        problem = f"{column} must be {kinds}, got {type(value).__name__}"
        raise row_refusal(place, problem, "write [{role, content}, …] (.jsonl holds lists, .csv cannot)")
    if not value:
        raise row_refusal(place, f"{column} is empty", "fill it in or remove the row")
    return [_message(message, f"{column}[{i}]", place) for i, message in enumerate(value)]


def _message(message: Any, name: str, place: str) -> Message:
    if not isinstance(message, Mapping):
        problem = f"{name} is {type(message).__name__}, not a message"
        raise row_refusal(place, problem, "write it as {role, content}")
    for part in ("role", "content"):
        if not isinstance(message.get(part), str):
            found = type(message[part]).__name__ if part in message else "nothing"
            remedy = f"write {{role, content}}, both strings (keys found: {', '.join(map(str, message))})"
            raise row_refusal(place, f"{name} needs a string as its {part}, got {found}", remedy)
    role = message["role"]
    if role not in ROLES:
        close = difflib.get_close_matches(role, ROLES, n=1)
        meant = _ROLE_NAMES_ELSEWHERE.get(role, close[0] if close else None)
        remedy = f"{f'did you mean {meant}? ' if meant else ''}roles are {', '.join(ROLES)}"
        raise row_refusal(place, f"{name} has the role {role!r}", remedy)
    return dict(message)


def _check_contents(messages: list[Message], loss_turns: list[int], place: str) -> None:
    prompt = messages[: loss_turns[0]] if loss_turns else messages
    if not prompt:
        problem = "the prompt is empty: the conversation begins with the assistant"
        raise row_refusal(place, problem, "put a system or user turn before it, or remove the row")
    if all(not message["content"].strip() for message in prompt):
        raise row_refusal(place, "the prompt is empty or white space", "fill it in or remove the row")
    for turn in loss_turns:
        if not messages[turn]["content"].strip():
            problem = f"the assistant's completion is empty (message {turn}, counted from 0)"
            raise row_refusal(place, problem, "fill it in or remove the row")


def _running_text(text: Any, turns: Literal["all", "last"], place: str) -> RunningText:
    if turns == "last":
        problem = "a text column has no prompt, which this method needs"
        raise row_refusal(place, problem, "name the prompt's column in data.columns, or choose method=sft")
    if not isinstance(text, str) or not text.strip():
        found = "only white space" if isinstance(text, str) else type(text).__name__
        raise row_refusal(place, f"text must be a string that says something, got {found}", "remove the row")
    return RunningText(text)


def _no_known_column(fields: Mapping[str, Any], place: str) -> ConfigError:
    names = [str(name) for name in fields]
    close = [f"{name} for {c}" for c in COLUMNS for name in difflib.get_close_matches(c, names, n=1)]
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    problem = f"no column messages, prompt or text; columns found: {', '.join(names) or 'none'}{hint}"
    return row_refusal(place, problem, "name yours in data.columns, e.g. data.columns.prompt=question")
