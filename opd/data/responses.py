"""Stored answers to a run's prompts: one line of responses.jsonl each, found again by the prompt's ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from opd.data.files import FileExamples
from opd.errors import ConfigError
from opd.protocols import Example, ExampleSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSES = "responses.jsonl"


def write_response(row: Example, ids: list[int], finished: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """The line of one answer; `ids` include the stop token where it `finished`."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    prompt = tokenizer.decode(row.prompt_ids)
    record = {"row": row.row, "prompt": prompt, "response": text, "finished": finished}
    return json.dumps({**record, "prompt_ids": row.prompt_ids, "completion_ids": ids}, ensure_ascii=False)


def with_responses(examples: ExampleSet, folder: Path, max_completion_length: int) -> FileExamples:
    """The rows with `alternatives["response"]` from the folder that mode=responses wrote, cut to that many tokens.

    The summary counts those that were cut (truncated_responses). Raises ConfigError where a row's prompt has no answer.
    """
    file, setting = folder / RESPONSES, f"data.responses={folder}"
    if not file.is_file():
        raise ConfigError(f"{setting}: no {RESPONSES} lies there; make it with mode=responses")
    answers: dict[tuple[int, ...], dict[int, list[int]]] = {}  # of rows with one prompt, each has its own
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1]):
        try:
            record = json.loads(line)
            answers.setdefault(tuple(record["prompt_ids"]), {})[record["row"]] = record["completion_ids"]
        except (ValueError, KeyError, TypeError):
            problem = f"line {number + 1} of {RESPONSES} is no answer"
            raise ConfigError(f"{setting}: {problem}; make it again with mode=responses") from None
    rows, truncated = [], 0
    for example in (examples[i] for i in range(len(examples))):
        found = answers.get(tuple(example.prompt_ids), {})
        answer = found.get(example.row) or next(iter(found.values()), None)
        if not answer:
            raise ConfigError(
                f"{setting}: has no answer to the prompt of row {example.row} as this run reads it (other data, "
                "tokenizer or template); make it again with mode=responses"
            )
        truncated += len(answer) > max_completion_length
        answer = answer[:max_completion_length]
        rows.append(replace(example, alternatives={**example.alternatives, "response": answer}))
    return FileExamples(rows, {"truncated_responses": truncated})
