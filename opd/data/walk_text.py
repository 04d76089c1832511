"""Prompts and answers of the number walk as the ids of any tokenizer with a chat template and an end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd.data.walk_rules import render_prompt
from opd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, start: int, goal: int, hint: Sequence[int] = ()) -> list[int]:
    """The prompt through the chat template, up to where the assistant begins to speak."""
    return encode(tokenizer, chat(tokenizer, render_prompt(start, goal, hint)))


def chat(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """The conversation in which the user has said this and the assistant is about to answer. Raises ConfigError."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"data=walk: the tokenizer of {tokenizer.name_or_path} has no chat template, through which the walk asks; "
            "set model.student.chat_template=chatml"
        )
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of the text and nothing else."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. Raises ConfigError if there is none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(
            f"the walk needs a tokenizer with an eos_token to end answers; {tokenizer.name_or_path!r} "
            f"has eos_token_id {tokenizer.eos_token_id}: set its eos_token"
        )
    return tokenizer.eos_token_id


def walk_fields(start: int, goal: int, completion: str, hint: Sequence[int] = ()) -> dict[str, int | str]:
    """What a row says about itself, for its score and for the record."""
    return {"start": start, "goal": goal, "prompt": render_prompt(start, goal, hint), "completion": completion}
