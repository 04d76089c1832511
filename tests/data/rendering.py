"""Rendering as the tests ask for it, and what they look at in the result."""

import pytest
import small_tokenizers
from small_tokenizers import chatml

from opd.data.chat import render
from opd.errors import ConfigError

WHERE = "data.path=/data/train.jsonl"

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi, how are you?"},
    {"role": "user", "content": "Fine. And you?"},
    {"role": "assistant", "content": "I am fine, 谢谢."},
]


def rendered(fields, tokenizer, turns="last"):
    stop_ids = small_tokenizers.stop_ids(tokenizer)
    return render(fields, tokenizer, turns=turns, stop_ids=stop_ids, row=7, where=WHERE)


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def loss_texts(example, tokenizer):
    """The runs of loss tokens, decoded."""
    mask = example.completion_mask or [True] * len(example.completion_ids)
    assert len(mask) == len(example.completion_ids)
    runs = [[]]
    for token, is_loss in zip(example.completion_ids, mask, strict=True):
        if is_loss:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [text(tokenizer, run) for run in runs if run]


def refusal(fields, *parts, tokenizer=None, turns="last"):
    """The row is refused in one line that names the file, the row and every one of `parts`."""
    with pytest.raises(ConfigError) as caught:
        rendered(fields, tokenizer or chatml(), turns)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{WHERE}, row 7: ", "; ", *parts):
        assert part in message, message
