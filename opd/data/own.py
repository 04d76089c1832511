"""The rows of a run that brings its own, and its evaluation: a file, a data set, a mixture of these, or a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.config import Config, Data, Origin
from opd.data.files import rendered_examples, split_evaluation
from opd.data.mixture import mix
from opd.data.origins import columns_of, name_of, rows_of
from opd.data.rendering import Rendering, prompt_identity
from opd.data.stream import StreamedExamples
from opd.errors import ConfigError
from opd.protocols import Example, ExampleSet

Loaded = tuple[ExampleSet, Sequence[Example], dict[str, Any]]
"""(training rows, evaluation rows, what is to be told of both)."""


def load_own(config: Config, rendering: Rendering) -> Loaded:
    """Rows that `data` names. Evaluation rows are others of data.eval_path or eval_split, or some that are held out.

    Raises ConfigError, in one line.
    """
    settings = config.data
    if settings.streaming:
        return _streamed(config, rendering)
    if settings.name == "mixture":
        examples = mix(settings.sources, rendering, limit=settings.limit, seed=config.run.seed)
    else:
        rows = list(rows_of(settings, "data.", limit=settings.limit))  # a broken file is told before rows are rendered
        examples = rendered_examples(rows, rendering, columns_of(settings), name_of(settings, "data."))
    if not settings.eval_prompts:
        return examples, [], examples.summary
    if (other := evaluation_origin(settings)) is not None:
        known = frozenset(prompt_identity(examples[row]) for row in range(len(examples)))
        evaluation, told = _first_kept(other, settings, rendering, known)
        return examples, evaluation, {**examples.summary, **told}
    train, held_out = split_evaluation(examples, settings.eval_prompts, config.run.seed, key="data.eval_prompts")
    return train, [held_out[row] for row in range(len(held_out))], examples.summary


def evaluation_origin(settings: Data) -> Origin | None:
    """Where evaluation rows come from; None where some of the training rows are held out."""
    split = settings.eval_split or settings.split
    if settings.eval_path is not None:
        return settings.model_copy(
            update={"path": settings.eval_path, "split": split, "revision": None, "subset": None}
        )
    return settings.model_copy(update={"split": split}) if settings.eval_split is not None else None


def _first_kept(
    origin: Origin, settings: Data, rendering: Rendering, known: frozenset[tuple[Any, ...]]
) -> tuple[list[Example], dict[str, Any]]:
    """The first data.eval_prompts rows whose prompts are not `known` from training; what became of the others."""
    where, tally, in_train = name_of(origin, "data.eval_"), rendering.tally(), 0
    kept: list[Example] = []
    for example in rendering.examples(rows_of(origin, "data.eval_"), columns_of(origin), where, tally):
        if prompt_identity(example) in known:
            in_train += 1
            continue
        kept.append(example)
        if len(kept) == settings.eval_prompts:
            break
    if not kept and in_train:
        problem = f"all of its {in_train} prompts are also trained on"
        raise ConfigError(f"{where}: {problem}; give other rows, or set data.eval_path and data.eval_split to null")
    if not kept:
        raise rendering.nothing_kept(where, tally)
    counts = {"evaluation_in_train": in_train, "evaluation_dropped": dict(tally.dropped)}
    return kept, {**counts, "evaluation_truncated": tally.truncated}


def _streamed(config: Config, rendering: Rendering) -> Loaded:
    """A stream, and evaluation rows of their own or from its head; it leaves out every row with a prompt of these."""
    settings, evaluation, told = config.data, [], {}
    if settings.eval_prompts:
        origin = evaluation_origin(settings) or settings
        evaluation, told = _first_kept(origin, settings, rendering, frozenset())
    assert config.train.max_steps is not None
    train = StreamedExamples(
        lambda: rows_of(settings, "data.", limit=settings.limit, streaming=True),
        rendering,
        columns_of(settings),
        name_of(settings, "data."),
        length=config.train.max_steps * config.train.batch_size,
        seed=config.run.seed,
        buffer=settings.shuffle_buffer,
        held_out=frozenset(map(prompt_identity, evaluation)),
    )
    told = {name: count for name, count in told.items() if name != "evaluation_in_train"}
    return train, evaluation, {"streamed": len(train), **told}
