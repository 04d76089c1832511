"""What is asked of a teacher, and how a method's teachers are asked about a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd.lockstep import in_step
from opd.protocols import Batch, Dense, Layout, Needs, Scores, Sparse, TokenSequence


class Teacher(ABC):
    """Scores of a layout's loss tokens. `sequences` are those of the layout, in its order.

    `is_kept`: it computes nothing, but tells what was computed before.
    """

    is_kept: ClassVar[bool] = False

    @abstractmethod
    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Scores:
        """Distributions, dense or sparse."""

    @abstractmethod
    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """log p(targets[n]) in nats of the logits divided by `temperature`, (N,)."""

    @property
    def sharded_model(self) -> Any:
        """The model whose forwards every rank has to take part in when it is asked; None: there is no such model."""
        return None

    def after_step(self) -> None:  # noqa: B027  most teachers stay as they are
        """Hear that the student's weights have changed."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write into a checkpoint what cannot be made again."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Take it up from there."""


def asked_unevenly(teachers: Iterable[Teacher]) -> AbstractContextManager[None]:
    """Inside, a rank with fewer rows than others may ask sharded teachers less often; see opd.lockstep.in_step."""
    sharded = {id(teacher): (model, teacher) for teacher in teachers if (model := teacher.sharded_model) is not None}
    return in_step(*((model, partial(_accompany, teacher, model.device)) for model, teacher in sharded.values()))


def _accompany(teacher: Teacher, device: torch.device) -> None:
    """Take part in another rank's asking, of a single token."""
    token = torch.zeros(1, dtype=torch.long, device=device)
    teacher.score(Layout(token[None], torch.ones_like(token)[None], None, token, token, token), [])


def ask_teachers(needs: Needs, teachers: Mapping[str, Teacher], batch: Batch) -> dict[str, Scores]:
    """The teachers' distributions; log-probabilities alone go to batch.token_scores["<name>_logprobs"].

    A teacher that is asked about some kinds of sequences only computes on these; what it did not score is NaN.
    """
    scores: dict[str, Scores] = {}
    for name, need in needs.teachers.items():
        view, sequences, tokens = batch.views.get(name, batch.layout), batch.sequences, None
        if need.kinds is not None:
            rows = [i for i, sequence in enumerate(sequences) if sequence.kind in need.kinds]
            sequences, (view, tokens) = [sequences[i] for i in rows], _part(view, rows)
        total = len(batch.layout.targets)
        if need.scores != "logprobs":
            scored = teachers[name].score(view, sequences)
            scores[name] = scored if tokens is None else _spread_scores(scored, tokens, total)
        elif f"{name}_logprobs" not in batch.token_scores:
            logprobs = teachers[name].logprobs(view, sequences)
            batch.token_scores[f"{name}_logprobs"] = logprobs if tokens is None else _spread(logprobs, tokens, total)
    return scores


def _part(layout: Layout, views: list[int]) -> tuple[Layout, Tensor]:
    """Some views of a layout, and the numbers that their loss tokens have in the whole."""
    number = layout.owner.new_full((int(layout.owner.max()) + 1 if len(layout.owner) else 0,), -1)
    wanted = [view for view in views if view < len(number)]
    number[wanted] = number.new_tensor([i for i, view in enumerate(views) if view < len(number)])
    tokens = (number[layout.owner] >= 0).nonzero()[:, 0]
    owner = number[layout.owner[tokens]]
    part = replace(layout, predictors=layout.predictors[tokens], targets=layout.targets[tokens], owner=owner)
    if layout.position_ids is not None or layout.attention_mask is None:
        return part, tokens  # packed rows are shared: all are computed, some are read
    width = layout.input_ids.shape[1]
    return replace(
        part,
        input_ids=layout.input_ids[views],
        attention_mask=layout.attention_mask[views],
        predictors=part.predictors % width + owner * width,
    ), tokens


def _spread_scores(scores: Scores, tokens: Tensor, total: int) -> Scores:
    if isinstance(scores, Dense):
        return Dense(_spread(scores.hidden, tokens, total), scores.head)
    ids = scores.ids.new_zeros(total, scores.ids.shape[1])
    ids[tokens] = scores.ids
    return Sparse(ids, _spread(scores.logprobs, tokens, total), _spread(scores.tail, tokens, total))


def _spread(values: Tensor, tokens: Tensor, total: int) -> Tensor:
    whole = values.new_full((total, *values.shape[1:]), float("nan"))
    whole[tokens] = values
    return whole
