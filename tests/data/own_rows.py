"""Rows as a run loads them: a composed config, a small tokenizer, no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contract.variants import compose, run_alone
from small_tokenizers import chatml, stop_ids

from opd.conditions import validated
from opd.data import load_data
from opd.errors import ConfigError
from opd.methods import METHODS

SAMPLES = Path(__file__).parent / "samples"
BASE = ("model/student=path", "model.student.path=hub/model", "train.batch_size=1")


def config_of(*words):
    """The config of a run on rows of one's own; `words` name method and data."""
    return validated(run_alone(compose(*BASE, *words)))


def loaded(*words, tokenizer=None):
    config, tokenizer = config_of(*words), tokenizer or chatml()
    needs = METHODS[config.method.name](config.method).needs
    return load_data(config, tokenizer, needs, stop_ids(tokenizer))


def refused(*words, parts=(), tokenizer=None):
    """It is refused in one line with every one of `parts`."""
    with pytest.raises(ConfigError) as caught:
        loaded(*words, tokenizer=tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("; ", *parts):
        assert part in message, message


def rows_of(examples):
    return [examples[row] for row in range(len(examples))]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(*numbers):
    return [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}.", "n": n} for n in numbers]
