"""Data as a run sees it: rows to train on, rows to evaluate on, and a score of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.config import Config, Data
from opd.data.files import FileExamples
from opd.data.own import load_own
from opd.data.rendering import Rendering
from opd.data.responses import with_responses
from opd.data.stream import StreamedExamples as StreamedExamples
from opd.data.templates import check_system_prompt
from opd.data.walk import PAIRED, WalkTask
from opd.data.walk_rules import training_pairs
from opd.errors import ConfigError
from opd.protocols import Example, ExampleSet, Needs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = Callable[[Example, str, bool], dict[str, float]]
"""(row, decoded completion without its stop token, whether it finished) -> {metric: value}."""


@dataclass(frozen=True)
class DataSet:
    """Rows of a run. `probes` are further prompt sets, scored greedily; `summary` is shown and kept."""

    train: ExampleSet
    evaluation: Sequence[Example]
    score: Score
    probes: dict[str, Sequence[Example]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, float]:
        """The summary as metrics: data/kept, data/dropped_prompt_too_long, data/sources_chat_used, ..."""
        return dict(_flat(self.summary, "data/"))


def load_data(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    needs: Needs,
    stop_ids: frozenset[int],
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> DataSet:
    """The rows that `data` names, in the student's ids, as the method reads them.

    `teacher_tokenizer`: the teacher's, where it is another one; rows then hold the teacher's prompt in its ids. Refuses
    fewer rows than a step needs.
    """
    data = (_walk if config.data.name == "walk" else _own)(config, tokenizer, needs, stop_ids, teacher_tokenizer)
    if needs.rows is not None and needs.rows < len(data.train):
        first = FileExamples([data.train[row] for row in range(needs.rows)], {})
        data = replace(data, train=first, summary={**data.summary, "first_rows_only": needs.rows})
    if needs.stored_responses and config.mode != "responses":
        assert config.data.responses is not None
        answered = with_responses(data.train, Path(config.data.responses), config.data.max_completion_length)
        data = replace(data, train=answered, summary={**data.summary, **answered.summary})
    if config.trains and len(data.train) < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: the data has only {len(data.train)} training rows "
            f"({_counts(config.data, data)}); lower it to {len(data.train)} or less"
        )
    return data


def _flat(told: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in told.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}_")
        elif not isinstance(value, str):
            yield f"{prefix}{name}", float(value)


def check_lengths(config: Config, data: DataSet, needs: Needs, max_positions: dict[str, int | None]) -> None:
    """Refuse sequences longer than a model was made for: beyond its positions it computes, but not sense.

    `max_positions`: {key of the model's path: its limit}. Of a stream's rows only the limits are known.
    """
    is_stream = isinstance(data.train, StreamedExamples)
    rows = [] if is_stream else [data.train[row] for row in range(len(data.train))]
    rows += data.evaluation
    samples = needs.rollouts or config.mode == "responses" or data.evaluation
    sampled = config.rollout.max_completion_tokens if samples else 0
    if data.evaluation:
        sampled = max(sampled, config.evaluation.max_completion_tokens or 0)
    longest = max((_longest_prompt(row) + max(_longest_answer(row), sampled) for row in rows), default=0)
    if is_stream:
        answer = 0 if needs.completions == "unused" else config.data.max_completion_length
        longest = max(longest, config.data.max_prompt_length + max(answer, sampled))
    for key, limit in max_positions.items():
        if limit is not None and longest > limit:
            raise ConfigError(
                f"{key}: it has {limit} positions, and prompt and completion reach {longest}; lower "
                f"data.max_prompt_length={config.data.max_prompt_length}, "
                f"data.max_completion_length={config.data.max_completion_length} or "
                f"rollout.max_completion_tokens={config.rollout.max_completion_tokens}"
            )


def _longest_prompt(row: Example) -> int:
    return max(map(len, [row.prompt_ids, *row.teacher_prompts.values()]))


def _longest_answer(row: Example) -> int:
    return max(map(len, [row.completion_ids or [], *row.alternatives.values()]))


def _counts(settings: Data, data: DataSet) -> str:
    rows, held_out = data.summary.get("rows", len(data.train)), len(data.evaluation)
    return f"{rows} rows, {held_out} held out by data.eval_prompts={settings.eval_prompts}"


def _walk(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    needs: Needs,
    stop_ids: frozenset[int],
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> DataSet:
    del stop_ids
    task, settings = WalkTask(config.data.variant), config.data
    check_variant(config, needs)
    asked = settings.limit or len(training_pairs())
    train = task.train(tokenizer, asked, config.run.seed, teacher_tokenizer)
    dropped = {"chosen_is_rejected": asked - len(train)} if len(train) < asked else {}
    summary = {"rows": asked, "kept": len(train), "dropped": dropped}
    if not settings.eval_prompts:
        return DataSet(train, [], task.score, summary=summary)
    held_out = task.evaluation(tokenizer, settings.eval_prompts, teacher_tokenizer)
    evaluation = [held_out[row] for row in range(len(held_out))]
    probes = task.probes(tokenizer, settings.eval_prompts)
    return DataSet(train, evaluation, task.score, dict(probes), summary)


def check_variant(config: Config, needs: Needs) -> None:
    """Refuse a variant of the walk that lacks what the method learns from."""
    variant, method = config.data.variant, config.method.name
    if "chosen" in needs.sequences and variant not in PAIRED:
        raise ConfigError(f"data.variant={variant}: method={method} learns from preference pairs; use data=walk_bold")
    if needs.privileged and variant != "hint":
        raise ConfigError(f"data.variant={variant}: method={method} needs a hint for its teacher; use data=walk_hint")


def _own(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    needs: Needs,
    stop_ids: frozenset[int],
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> DataSet:
    if config.data.system_prompt is not None:
        check_system_prompt(tokenizer, config.data.system_prompt)
    rendering = Rendering(
        tokenizer,
        # Held-out rows are scored by their completions, so that methods that do not learn from them can be compared.
        replace(needs, completions="optional") if needs.completions == "unused" else needs,
        stop_ids,
        config.data.max_prompt_length,
        config.data.max_completion_length,
        teacher_tokenizer,
        config.data.system_prompt,
        config.data.bad_rows == "drop",
    )
    train, evaluation, summary = load_own(config, rendering)
    return DataSet(train, evaluation, _exact_match(tokenizer, stop_ids), summary=summary)


def _exact_match(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> Score:
    """1 where the answer is the row's completion, white space at the ends aside; nothing for rows without one.

    Of a conversation with several learnt turns the prompt leads to the first, which is compared.
    """

    def score(example: Example, text: str, finished: bool) -> dict[str, float]:
        del finished
        if not example.completion_ids:
            return {}
        mask = example.completion_mask or [True] * len(example.completion_ids)
        turn = example.completion_ids[: mask.index(False) if False in mask else None]
        wanted = tokenizer.decode([i for i in turn if i not in stop_ids])
        return {"exact_match": float(text.strip() == str(wanted).strip())}

    return score
