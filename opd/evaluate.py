"""What a model can do: scores of its answers, and its divergence to the teacher.

Draws are addressed by row, so evaluating twice gives the same numbers and training never notices. Metrics are sums over
rows or tokens, added up over ranks and divided last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from opd import distributed
from opd.config import Config
from opd.data import DataSet
from opd.data.collate import lay_out
from opd.models import Vocabulary, causal_lm, computing, hidden_states, read_head
from opd.objectives import divergence_loss, negative_log_likelihood, sum_over_tokens
from opd.protocols import Dense, Example, Layout, TokenView
from opd.sources.rollouts import Completion, Sampling, evaluation_mode, sample
from opd.teachers import LocalTeacher

Sums = dict[str, list[float]]


class Evaluator:
    """Evaluates a model on the held-out prompts; every rank takes its share of them."""

    def __init__(
        self,
        config: Config,
        data: DataSet,
        *,
        tokenizer: Any,
        vocabulary: Vocabulary,
        teacher: LocalTeacher | None,
    ) -> None:
        self._config, self._data, self._tokenizer = config, data, tokenizer
        self._vocabulary, self._teacher = vocabulary, teacher
        self._rows = list(data.evaluation[distributed.rank() :: distributed.world_size()])
        self._prompted = [row for row in self._rows if row.prompt_ids]  # running text is only scored
        self._teacher_answers: list[Completion] = []

    def __call__(self, model: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics over all evaluation rows, and this rank's first answers for the record."""
        with torch.no_grad(), computing(self._config.hardware):
            return self._evaluate(model)

    def _evaluate(self, model: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        model, settings, sums = causal_lm(model), self._config.evaluation, defaultdict(lambda: [0.0, 0.0])
        samples: list[dict[str, Any]] = []
        if not self._data.evaluation:
            return {}, samples
        sampled: list[Completion] = []
        if settings.greedy:
            answers = self._answer(model, self._prompted, "greedy")
            samples = self._score(self._prompted, answers, "_greedy", sums)
            self._probe(model, sums)
        if settings.sampled or (settings.divergence and self._teacher):
            sampled = self._answer(model, self._prompted, "sampled")
        if settings.sampled:
            self._score(self._prompted, sampled, "_sampled", sums)
            for answer in sampled:
                _add(sums, "length_mean", len(answer.ids))
                _add(sums, "truncated_fraction", not answer.finished)
        self._likelihood(model, sums)
        if settings.divergence and self._teacher:
            self._divergence(model, sampled, sums)
        metrics = _divide(sums)
        if "loss" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        return metrics, samples

    def _answer(self, model: Any, rows: Sequence[Example], how: str) -> list[Completion]:
        """Greedy answers, or answers at temperature 1 from the whole distribution."""
        length = self._config.evaluation.max_completion_tokens or self._config.rollout.max_completion_tokens
        sampling = Sampling(length, temperature=float(how != "greedy"), batch_size=self._config.evaluation.batch_size)
        addresses = [(0, f"evaluation_{how}", row.row) for row in rows]
        prompts = [row.prompt_ids for row in rows]
        return sample(model, prompts, addresses=addresses, sampling=sampling, vocabulary=self._vocabulary)

    def _score(
        self, rows: Sequence[Example], answers: Sequence[Completion], suffix: str, sums: Sums
    ) -> list[dict[str, Any]]:
        samples = []
        for row, answer in zip(rows, answers, strict=True):
            text = self._text(answer)
            scores = self._data.score(row, text, answer.finished)
            for name, value in scores.items():
                _add(sums, name + suffix, value)
            samples.append(
                {
                    "prompt": self._tokenizer.decode(row.prompt_ids),
                    "completion": text,
                    "finished": answer.finished,
                    **scores,
                }
            )
        return samples

    def _probe(self, model: Any, sums: Sums) -> None:
        for name, examples in self._data.probes.items():
            rows = list(examples[distributed.rank() :: distributed.world_size()])
            for row, answer in zip(rows, self._answer(model, rows, "greedy"), strict=True):
                _add(sums, name, self._data.score(row, self._text(answer), answer.finished)["success"])

    def _text(self, answer: Completion) -> str:
        return str(self._tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids))

    def _likelihood(self, model: Any, sums: Sums) -> None:
        """loss: -log π of the rows' own completions, nats a token."""
        rows = [row for row in self._rows if row.completion_ids]
        views = [_view(row.prompt_ids, row.completion_ids or [], row.completion_mask) for row in rows]
        for layout in self._layouts(views, model):
            values = sum_over_tokens(self._dense(model, layout), negative_log_likelihood(layout.targets)).values
            _add(sums, "loss", float(values.sum()), len(values))

    def _divergence(self, model: Any, sampled: Sequence[Completion], sums: Sums) -> None:
        """forward_kl, KL(teacher ‖ student) on the teacher's answers, and reverse_kl on the student's; nats a token."""
        assert self._teacher is not None
        share = range(distributed.rank(), self._config.evaluation.divergence_prompts, distributed.world_size())
        rows = self._prompted[: len(share)]
        if not self._teacher_answers:
            self._teacher_answers = self._answer(self._teacher.model, rows, "teacher")
        for name, answers in (("forward_kl", self._teacher_answers), ("reverse_kl", sampled[: len(rows)])):
            views = [_view(row.prompt_ids, answer.ids) for row, answer in zip(rows, answers, strict=True)]
            for layout in self._layouts(views, model):
                loss = divergence_loss(self._teacher.dense(layout), beta=float(name == "reverse_kl"))
                values = sum_over_tokens(self._dense(model, layout), loss).values
                _add(sums, name, float(values.sum()), len(values))

    def _layouts(self, views: list[TokenView], model: Any) -> list[Layout]:
        size = self._config.evaluation.batch_size
        pad = self._vocabulary.pad_id
        parts = (views[start : start + size] for start in range(0, len(views), size))
        return [lay_out(part, pad_id=pad, device=model.device) for part in parts]

    def _dense(self, model: Any, layout: Layout) -> Dense:
        with evaluation_mode(model):
            hidden = hidden_states(model, layout.input_ids, layout.attention_mask).flatten(0, 1)[layout.predictors]
        return Dense(hidden, read_head(model, self._vocabulary.size))


def _view(prompt_ids: list[int], completion_ids: list[int], mask: list[bool] | None = None) -> TokenView:
    loss = mask if mask is not None else [True] * len(completion_ids)
    return TokenView(prompt_ids + completion_ids, [False] * len(prompt_ids) + loss)


def _add(sums: Sums, name: str, value: float, count: float = 1.0) -> None:
    sums[name][0] += float(value)
    sums[name][1] += count


def _divide(sums: Sums) -> dict[str, float]:
    # A rank without rows of some kind still has to name the metric; the union of names is agreed by sorting them.
    names = distributed.union(sums)
    totals = distributed.total(torch.tensor([sums.get(name, [0.0, 0.0]) for name in names], dtype=torch.float64))
    return {name: float(pair[0] / pair[1]) for name, pair in zip(names, totals, strict=True) if pair[1]}
