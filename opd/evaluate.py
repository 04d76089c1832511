"""What a model can do: scores of its answers, and its divergence to the teacher.

Draws are addressed by row, so evaluating twice gives the same numbers and training never notices. Metrics are sums over
rows or tokens, added up over ranks and divided last; each row's share is kept, for comparisons prompt by prompt.

Ranks may have different numbers of rows, or none. The student's weights are whole here (opd.sharding.gathered), so its
forwards wait for nobody; those of a sharded teacher do, and are made inside of `asked_unevenly`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opd import distributed
from opd.config import Config
from opd.data import DataSet
from opd.data.collate import lay_out
from opd.models import causal_lm, computing, evaluation_mode, predicting_states, read_head
from opd.objectives import divergence_loss, negative_log_likelihood, sum_over_tokens
from opd.protocols import Dense, Example, Layout, Method, TokenView
from opd.sources import SequenceSource
from opd.sources.rollouts import Completion, Sampling, sample
from opd.teachers import LocalTeacher, Teacher, ask_teachers, asked_unevenly
from opd.tokenizers import Vocabulary
from opd.window import Batches

Columns = dict[str, "array[float]"]
"""{metric: row, sum, count, row, sum, count, …} of one rank's rows, as doubles."""


class Evaluated(NamedTuple):
    """`metrics` are over all rows of all ranks; `samples` (the first answers) and `scores` are this rank's."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    scores: Columns


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
        objective: MethodLoss | None = None,
    ) -> None:
        self._config, self._data, self._tokenizer = config, data, tokenizer
        self._vocabulary, self._teacher, self._objective = vocabulary, teacher, objective
        self._rows = list(data.evaluation[distributed.rank() :: distributed.world_size()])
        self._prompted = [row for row in self._rows if row.prompt_ids]  # running text is only scored
        self._teacher_answers: list[Completion] | None = None

    def __call__(self, model: Any) -> Evaluated:
        """Metrics over all evaluation rows, with this rank's answers and scores for the record."""
        with torch.no_grad(), computing(self._config.hardware):
            return self._evaluate(model)

    def _evaluate(self, model: Any) -> Evaluated:
        model, settings = causal_lm(model), self._config.evaluation
        scores: Columns = {}
        samples: list[dict[str, Any]] = []
        if not self._data.evaluation:
            return Evaluated({}, samples, scores)
        sampled: list[Completion] = []
        if settings.greedy:
            answers = self._answer(model, self._prompted, "greedy")
            samples = self._score(self._prompted, answers, "_greedy", scores)
            self._probe(model, scores)
        if settings.sampled or (settings.divergence and self._teacher):
            sampled = self._answer(model, self._prompted, "sampled")
        if settings.sampled:
            self._score(self._prompted, sampled, "_sampled", scores)
            for row, answer in zip(self._prompted, sampled, strict=True):
                _add(scores, "length_mean", row, len(answer.ids))
                _add(scores, "truncated_fraction", row, not answer.finished)
        self._likelihood(model, scores)
        if settings.divergence and self._teacher:
            self._divergence(model, sampled, scores)
        metrics = _divide(scores)
        if "nll" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
        if self._objective is not None:
            # A method may measure a forward_kl too, on the data's answers; here the name means the models' own.
            metrics = self._objective(model, self._rows) | metrics
        return Evaluated(metrics, samples, scores)

    def _answer(self, model: Any, rows: Sequence[Example], how: str) -> list[Completion]:
        """Greedy answers, or answers at temperature 1 from the whole distribution."""
        length = self._config.evaluation.max_completion_tokens or self._config.rollout.max_completion_tokens
        sampling = Sampling(length, temperature=float(how != "greedy"), batch_size=self._config.evaluation.batch_size)
        addresses = [(0, f"evaluation_{how}", row.row) for row in rows]
        prompts = [row.prompt_ids for row in rows]
        return sample(model, prompts, addresses=addresses, sampling=sampling, vocabulary=self._vocabulary)

    def _score(
        self, rows: Sequence[Example], answers: Sequence[Completion], suffix: str, scores: Columns
    ) -> list[dict[str, Any]]:
        samples = []
        for row, answer in zip(rows, answers, strict=True):
            text = self._text(answer)
            found = self._data.score(row, text, answer.finished)
            for name, value in found.items():
                _add(scores, name + suffix, row, value)
            samples.append(
                {
                    "prompt": self._tokenizer.decode(row.prompt_ids),
                    "completion": text,
                    "finished": answer.finished,
                    **found,
                }
            )
        return samples

    def _probe(self, model: Any, scores: Columns) -> None:
        for name, examples in self._data.probes.items():
            rows = list(examples[distributed.rank() :: distributed.world_size()])
            for row, answer in zip(rows, self._answer(model, rows, "greedy"), strict=True):
                _add(scores, name, row, self._data.score(row, self._text(answer), answer.finished)["success"])

    def _text(self, answer: Completion) -> str:
        return str(self._tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids))

    def _likelihood(self, model: Any, scores: Columns) -> None:
        """nll: -log π of the rows' own completions, nats a token."""
        rows = [row for row in self._rows if row.completion_ids]
        views = [_view(row.prompt_ids, row.completion_ids or [], row.completion_mask) for row in rows]
        for part, layout in self._layouts(rows, views, model):
            values = sum_over_tokens(self._dense(model, layout), negative_log_likelihood(layout.targets)).values
            _add_tokens(scores, "nll", part, layout, values)

    def _divergence(self, model: Any, sampled: Sequence[Completion], scores: Columns) -> None:
        """forward_kl, KL(teacher ‖ student) on the teacher's answers, and reverse_kl on the student's; nats a token."""
        assert self._teacher is not None
        share = range(distributed.rank(), self._config.evaluation.divergence_prompts, distributed.world_size())
        rows = self._prompted[: len(share)]
        if self._teacher_answers is None:
            self._teacher_answers = self._answer(self._teacher.model, rows, "teacher")
        with asked_unevenly([self._teacher]):
            for name, answers in (("forward_kl", self._teacher_answers), ("reverse_kl", sampled[: len(rows)])):
                views = [_view(row.prompt_ids, answer.ids) for row, answer in zip(rows, answers, strict=True)]
                for part, layout in self._layouts(rows, views, model):
                    loss = divergence_loss(self._teacher.dense(layout), beta=float(name == "reverse_kl"))
                    values = sum_over_tokens(self._dense(model, layout), loss).values
                    _add_tokens(scores, name, part, layout, values)

    def _layouts(
        self, rows: Sequence[Example], views: list[TokenView], model: Any
    ) -> Iterable[tuple[Sequence[Example], Layout]]:
        size = self._config.evaluation.batch_size
        pad = self._vocabulary.pad_id
        for part in (slice(start, start + size) for start in range(0, len(views), size)):
            yield rows[part], lay_out(views[part], pad_id=pad, device=model.device)

    def _dense(self, model: Any, layout: Layout) -> Dense:
        with evaluation_mode(model):
            hidden = predicting_states(model, layout)
        return Dense(hidden, read_head(model, self._vocabulary.size))


class MethodLoss:
    """A method's own loss and metrics on the held-out rows, for methods that learn from data alone."""

    def __init__(
        self,
        config: Config,
        method: Method,
        vocabulary: Vocabulary,
        source: SequenceSource,
        teachers: Mapping[str, Teacher],
        device: torch.device,
    ) -> None:
        self._method, self._source, self._teachers, self._vocabulary = method, source, teachers, vocabulary
        self._batches = Batches(config, method, vocabulary=vocabulary, device=device)

    def __call__(self, model: Any, rows: Sequence[Example]) -> dict[str, float]:
        """{"loss", and the method's metrics} over the rows of all ranks. Collective."""
        sequences, _ = self._source.sequences([(row.row, row) for row in self._source.answered(rows)])
        counts = self._batches.counts(sequences)
        sums: dict[str, list[float]] = {}
        shares: dict[str, float] = dict.fromkeys(counts, 0.0)
        with asked_unevenly(self._teachers.values()):
            for part in self._batches.parts(sequences):
                batch = self._batches.batch(part)
                scores = ask_teachers(self._method.needs, self._teachers, batch)
                with evaluation_mode(model):
                    hidden = predicting_states(model, batch.layout)
                    terms = self._method.loss(Dense(hidden, read_head(model, self._vocabulary.size)), scores, batch)
                for term in terms.terms:
                    shares[term.count] += term.weight * float(term.sum)
                for name, (numerator, denominator) in terms.metrics.items():
                    pair = sums.setdefault(name, [0.0, 0.0])
                    pair[0] += float(numerator)
                    pair[1] += float(denominator)
        loss = distributed.total(torch.tensor([[shares[name], counts[name]] for name in counts], dtype=torch.float64))
        names = distributed.union(sums)
        totals = distributed.total(torch.tensor([sums.get(n, [0.0, 0.0]) for n in names], dtype=torch.float64))
        metrics = {name: float(pair[0] / pair[1]) for name, pair in zip(names, totals, strict=True) if pair[1]}
        return {"loss": sum(float(pair[0] / pair[1]) for pair in loss if pair[1]), **metrics}


def _view(prompt_ids: list[int], completion_ids: list[int], mask: list[bool] | None = None) -> TokenView:
    loss = mask if mask is not None else [True] * len(completion_ids)
    return TokenView(prompt_ids + completion_ids, [False] * len(prompt_ids) + loss)


def row_scores(parts: Iterable[Mapping[str, Sequence[float]]]) -> list[dict[str, float]]:
    """One {"row": …, metric: value} a row, by row, from every rank's columns; a row lacks what it was not scored on.

    What is counted in tokens is the row's mean over them, with their number beside it ("nll", "nll_tokens"): the
    metric over all rows is the mean weighted by it, of any other metric the plain mean.
    """
    rows: dict[int, dict[str, list[float]]] = {}
    per_token = set()
    for columns in parts:
        for name, entries in columns.items():
            for row, value, count in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
                sums = rows.setdefault(int(row), {}).setdefault(name, [0.0, 0.0])
                sums[0] += value
                sums[1] += count
                if count != 1:
                    per_token.add(name)
    records = []
    for row, found in sorted(rows.items()):
        record: dict[str, float] = {"row": row}
        for name, (value, count) in sorted(found.items()):
            record[name] = value / count
            if name in per_token:
                record[f"{name}_tokens"] = int(count)
        records.append(record)
    return records


def _add(scores: Columns, name: str, row: Example, value: float, count: float = 1.0) -> None:
    scores.setdefault(name, array("d")).extend((row.row, float(value), count))


def _add_tokens(scores: Columns, name: str, rows: Sequence[Example], layout: Layout, values: torch.Tensor) -> None:
    owner = layout.owner.cpu()
    sums = torch.bincount(owner, weights=values.cpu().double(), minlength=len(rows)).tolist()
    counts = torch.bincount(owner, minlength=len(rows)).tolist()
    for row, value, count in zip(rows, sums, counts, strict=True):
        if count:
            _add(scores, name, row, value, count)


def _divide(scores: Columns) -> dict[str, float]:
    # A rank without rows of some kind still has to name the metric; the union of names is agreed by sorting them.
    names = distributed.union(scores)
    columns = [scores.get(name, array("d")) for name in names]
    sums = torch.tensor([[sum(column[1::3]), sum(column[2::3])] for column in columns], dtype=torch.float64)
    totals = distributed.total(sums)
    return {name: float(pair[0] / pair[1]) for name, pair in zip(names, totals, strict=True) if pair[1]}
