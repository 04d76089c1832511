"""A row of preference data -> the same prompt with the chosen and with the rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.data.columns import row_refusal
from opd.errors import ConfigError

PAIR_COLUMNS = ("chosen", "rejected")


def split_pair(fields: Mapping[str, Any], place: str, *, need_rejected: bool) -> dict[str, dict[str, Any]] | None:
    """{"chosen": fields, "rejected": fields}, each with `prompt` and `completion`; None if the row holds no pair.

    `chosen` and `rejected` are strings that answer `prompt`, or lists of messages: either the answer alone, which
    begins with the assistant, or the whole conversation, and then what both begin with is the prompt. "rejected" is
    read only if `need_rejected`; otherwise the prompt of a conversation is what stands before its last message, and a
    row with `messages`, `completion` or `text` is read by these. Raises ConfigError, in one line that opens with
    `place`.
    """
    if "chosen" not in fields or (not need_rejected and {"messages", "completion", "text"} & fields.keys()):
        if need_rejected:
            raise _no_column("chosen", "preferred", fields, place)
        return None
    if need_rejected and "rejected" not in fields:
        raise _no_column("rejected", "worse", fields, place)
    named = {name: fields[name] for name in (PAIR_COLUMNS if need_rejected else ("chosen",))}
    for name, value in named.items():
        if not value or not isinstance(value, str | list | tuple):
            found = "nothing" if isinstance(value, str | list | tuple) else type(value).__name__
            problem = f"{name} must be a string or a list of messages that says something, got {found}"
            raise row_refusal(place, problem, "fill it in or remove the row")
    if len(named) == 2 and named["chosen"] == named["rejected"]:
        raise row_refusal(place, "chosen and rejected are the same", "remove the row: it prefers nothing")
    prompt, answers = _prompt_and_answers(fields, named, place)
    if any(not isinstance(answer, str) and len(answer) > 1 for answer in answers.values()):
        problem = "chosen and rejected differ before their last message, so that it answers two prompts"
        raise row_refusal(place, problem, "cut both behind the first answer in which they differ, or remove the row")
    return {name: {"prompt": prompt, "completion": answer} for name, answer in answers.items()}


def _no_column(name: str, theirs: str, fields: Mapping[str, Any], place: str) -> ConfigError:
    problem = f"no column {name}; columns found: {', '.join(map(str, fields)) or 'none'}"
    return row_refusal(place, problem, f"name yours in data.columns, e.g. data.columns.{name}={theirs}")


def _prompt_and_answers(fields: Mapping[str, Any], named: Mapping[str, Any], place: str) -> tuple[Any, dict[str, Any]]:
    whole = {name: value for name, value in named.items() if _is_conversation(value)}
    if not whole:
        if fields.get("prompt") is None:
            raise _no_column("prompt", "question", fields, place)
        return fields["prompt"], dict(named)
    if len(whole) < len(named):
        problem = "one of chosen and rejected is a whole conversation, the other only an answer"
        raise row_refusal(place, problem, "write both alike")
    conversations = [list(value) for value in whole.values()]
    shared = _num_shared(conversations)
    if not 0 < shared < min(map(len, conversations)):
        problem = "chosen and rejected do not begin with the same prompt, or one of them ends with it"
        raise row_refusal(place, problem, "write the same messages before the answer of both")
    return conversations[0][:shared], {name: list(value)[shared:] for name, value in whole.items()}


def _is_conversation(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _num_shared(conversations: list[list[Any]]) -> int:
    """Messages that all begin with; of a single one, those before its last."""
    if len(conversations) == 1:
        return len(conversations[0]) - 1
    shared = 0
    for ours, theirs in zip(*conversations, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared
