"""What one optimizer step trains on: rows, rollouts, counts over all ranks, window scores, micro-batches.

Everything here is a function of (seed, step): a resumed run builds the same windows, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd import distributed
from opd.config import Config
from opd.data import StreamedExamples
from opd.data.collate import lay_out
from opd.protocols import Batch, Example, ExampleSet, Layout, Method, TokenSequence, TokenView
from opd.randomness import permutation
from opd.sources import SequenceSource
from opd.teachers import Teacher
from opd.tokenizers import Vocabulary

Metrics = dict[str, tuple[float, float]]
"""{name: (numerator, denominator)}."""


@dataclass
class Window:
    """One optimizer step: this rank's micro-batches and sequences; counts, metrics and sampled tokens of all ranks."""

    batches: list[Batch]
    counts: dict[str, float]
    metrics: Metrics
    sequences: list[TokenSequence] = field(default_factory=list)
    sampled: dict[str, int] = field(default_factory=dict)  # tokens, by who drew them


class RowOrder:
    """Which row the n-th prompt of the run is: pass after pass over the data, each in an order of its own.

    The last step of the last pass is filled from the next one, so that every step has the same number of prompts. A
    stream brings an order of its own.
    """

    def __init__(self, examples: ExampleSet, seed: int) -> None:
        self._examples, self._seed = examples, seed
        self._passes: dict[int, np.ndarray] = {}

    def rows(self, numbers: range) -> tuple[list[tuple[int, Example]], Metrics]:
        """The rows of these numbers, and of a stream what share of what was read for them was dropped or cut."""
        if not isinstance(self._examples, StreamedExamples):
            return [(number, self[number]) for number in numbers], {}
        streamed = [self._examples.at(number) for number in numbers]
        read = float(sum(row.read for row in streamed))
        dropped, truncated = sum(row.dropped for row in streamed), sum(row.truncated for row in streamed)
        lost = {"data/dropped_fraction": (float(dropped), read), "data/truncated_fraction": (float(truncated), read)}
        return list(zip(numbers, (row.example for row in streamed), strict=True)), lost

    def __getitem__(self, number: int) -> Example:
        if isinstance(self._examples, StreamedExamples):
            return self._examples[number]
        epoch, position = divmod(number, len(self._examples))
        if epoch not in self._passes:
            self._passes = {epoch: permutation(len(self._examples), self._seed, "row_order", epoch)}
        return self._examples[int(self._passes[epoch][position])]


class Batches:
    """Lays sequences out as micro-batches, and counts what the loss of a step is divided by."""

    def __init__(self, config: Config, method: Method, *, vocabulary: Vocabulary, device: torch.device) -> None:
        self._needs, self._vocabulary, self._device = method.needs, vocabulary, device
        self._size, self._method = config.train.micro_batch_size, method
        self._normalization, self._packed = config.method.loss_normalization, config.train.packing
        self._max_completion_tokens = config.rollout.max_completion_tokens

    def parts(self, sequences: list[TokenSequence]) -> list[list[TokenSequence]]:
        """The sequences, a micro-batch at a time."""
        return [sequences[start : start + self._size] for start in range(0, len(sequences), self._size)]

    def batch(self, sequences: list[TokenSequence]) -> Batch:
        """One micro-batch."""
        names = sequences[0].token_scores if sequences else {}
        scores = {name: torch.cat([s.token_scores[name] for s in sequences]).to(self._device) for name in names}
        weights = None
        if self._normalization == "sequence":
            lengths = [sequence.num_loss_tokens for sequence in sequences]
            weights = torch.tensor([1.0 / n for n in lengths for _ in range(n)], device=self._device)
        views = {
            # The student's pad id may be none of the teacher's; fill tokens are never read.
            name: self._layout([s.views[name] for s in sequences], 0 if name in sequences[0].alignments else None)
            for name in sequences[0].views
        }
        alignments = {name: self._alignment(sequences, name, views[name]) for name in sequences[0].alignments}
        layout = self._layout([sequence.student_view for sequence in sequences])
        return Batch(sequences, layout, views, alignments, scores, weights)

    def counts(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Denominators, of these sequences alone."""
        kinds = {kind: [s for s in sequences if s.kind == kind] for kind in self._needs.sequences}
        counts = {f"{kind}_tokens": self._normalizing_count(mine) for kind, mine in kinds.items()}
        counts |= {"tokens": self._normalizing_count(sequences), **self._method.counts(sequences)}
        counts |= {f"{kind}_loss_tokens": _num_loss_tokens(mine) for kind, mine in kinds.items()}
        return counts | {"loss_tokens": _num_loss_tokens(sequences)}

    def _layout(self, views: Sequence[TokenView], pad_id: int | None = None) -> Layout:
        return lay_out(
            views,
            pad_id=self._vocabulary.pad_id if pad_id is None else pad_id,
            device=self._device,
            at_labels=self._needs.label_states,
            packed=self._packed,
        )

    def _alignment(self, sequences: Sequence[TokenSequence], name: str, layout: Layout) -> Tensor:
        """(G, 5): the sequence, and its groups counted over the loss tokens of the batch."""
        theirs = layout.owner.bincount(minlength=len(sequences)).cumsum(0).tolist()
        groups, student = [], 0
        for i, sequence in enumerate(sequences):
            teacher = theirs[i - 1] if i else 0
            groups += [
                (i, student + a, student + b, teacher + c, teacher + d) for a, b, c, d in sequence.alignments[name]
            ]
            student += sequence.num_loss_tokens
        return torch.tensor(groups, dtype=torch.long, device=self._device).view(-1, 5)

    def _normalizing_count(self, sequences: Sequence[TokenSequence]) -> float:
        """What `loss_normalization` divides by, of this rank's sequences."""
        kind = self._normalization
        if kind == "sequence":
            return float(sum(sequence.num_loss_tokens > 0 for sequence in sequences))
        if kind == "constant":
            return float(len(sequences) * self._max_completion_tokens)
        if kind == "sum":
            return 1.0 / distributed.world_size()
        return _num_loss_tokens(sequences)


class WindowBuilder:
    """Builds windows in the order of the steps; `student_logprobs` scores a layout with the student as it is now."""

    def __init__(
        self,
        config: Config,
        method: Method,
        *,
        examples: ExampleSet,
        source: SequenceSource,
        teachers: Mapping[str, Teacher],
        vocabulary: Vocabulary,
        device: torch.device,
        student_logprobs: Callable[[Layout, float], Tensor],
    ) -> None:
        self._method, self._source, self._teachers = method, source, teachers
        self._batches = Batches(config, method, vocabulary=vocabulary, device=device)
        self._student_logprobs, self._batch_size = student_logprobs, config.train.batch_size
        self._order = RowOrder(examples, config.run.seed)
        self._pending: list[tuple[list[TokenSequence], Metrics, dict[str, int]]] = []
        ranks = distributed.world_size()
        self._prompts_per_rank = config.train.batch_size // ranks
        per_rank = self._prompts_per_rank * config.rollout.group_size * len(method.needs.sequences)
        self.num_micro_batches = -(-per_rank // config.train.micro_batch_size)

    def __call__(self, step: int) -> Window:
        """The window of this step (0-based). Collective: every rank calls it for every step."""
        if not self._pending:
            self._pending = self._produce(step)
        sequences, metrics, sampled = self._pending.pop(0)
        batches = [self._batches.batch(part) for part in self._batches.parts(sequences)]
        return Window(batches, _total(self._batches.counts(sequences)), metrics, sequences, sampled)

    @property
    def samples_next(self) -> bool:
        """Whether the next window begins with rollouts."""
        return self._method.needs.rollouts and not self._pending

    def save(self, folder: Path) -> None:
        """Keep rollouts that a later substep needs: the weights that made them are gone by then."""
        if self._pending:
            torch.save(self._pending, folder / f"rollouts-{distributed.rank()}.pt")

    def load(self, folder: Path) -> None:
        """Take them up again."""
        saved = folder / f"rollouts-{distributed.rank()}.pt"
        if saved.exists():
            self._pending = torch.load(saved, weights_only=False)

    def _produce(self, step: int) -> list[tuple[list[TokenSequence], Metrics, dict[str, int]]]:
        """The sequences of the next num_substeps steps, scored by the models as they are at the first of them."""
        made = []
        for substep in range(self._method.needs.num_substeps):
            first = (step + substep) * self._batch_size + distributed.rank() * self._prompts_per_rank
            numbers = range(first, first + self._prompts_per_rank)
            rows, lost = self._order.rows(numbers)
            sequences, sampled = self._source.sequences(rows)
            metrics, tokens = _rollout_metrics(sequences, sampled)
            made.append((sequences, {**metrics, **_summed(lost)}, tokens))
        if self._method.needs.window:
            everything = [sequence for sequences, _, _ in made for sequence in sequences]
            self._score(everything)
            told = self._method.window(everything, distributed.total)
            tokens = _total({"tokens": _num_loss_tokens(everything)})["tokens"]
            for _, metrics, _ in made:
                metrics.update({f"train/{name}": (value * tokens, tokens) for name, value in told.items()})
        return made

    @torch.no_grad()
    def _score(self, sequences: list[TokenSequence]) -> None:
        """Token log-probabilities of student and teachers, as numbers a loss token."""
        temperature = self._method.needs.window_temperature
        for part in self._batches.parts(sequences):
            batch = self._batches.batch(part)
            lengths = [sequence.num_loss_tokens for sequence in part]
            scored = {"student_logprobs": self._student_logprobs(batch.layout, temperature)}
            for name, teacher in self._teachers.items():
                view = batch.views.get(name, batch.layout)
                scored[f"{name}_logprobs"] = teacher.logprobs(view, part, temperature=temperature)
            for name, values in scored.items():
                for sequence, mine in zip(part, values.cpu().split(lengths), strict=True):
                    sequence.token_scores[name] = mine


def _num_loss_tokens(sequences: Sequence[TokenSequence]) -> float:
    return float(sum(sequence.num_loss_tokens for sequence in sequences))


def _total(counts: dict[str, float]) -> dict[str, float]:
    summed = distributed.total(torch.tensor(list(counts.values()), dtype=torch.float64))
    return dict(zip(counts, summed.tolist(), strict=True))


def _summed(metrics: Metrics) -> Metrics:
    """The metrics of this rank, over all ranks."""
    if not metrics:
        return {}
    above = _total({name: pair[0] for name, pair in metrics.items()})
    below = _total({name: pair[1] for name, pair in metrics.items()})
    return {name: (above[name], below[name]) for name in metrics}


def _rollout_metrics(
    sequences: Sequence[TokenSequence], sampled: Sequence[TokenSequence]
) -> tuple[Metrics, dict[str, int]]:
    """Length, truncation, entropy and on-policy share of one step's sequences of all ranks; tokens sampled, by whom."""
    lengths: dict[str, int] = dict.fromkeys(("student", "teacher", "mixture"), 0)
    for sequence in sampled:
        lengths[sequence.origin] += len(sequence.completion_ids)
    sums = _total(
        {
            "sequences": float(len(sequences)),
            "on_policy": float(sum(sequence.origin in ("student", "mixture") for sequence in sequences)),
            "sampled": float(len(sampled)),
            "truncated": float(sum(not sequence.finished for sequence in sampled)),
            "entropy": sum(sequence.entropy * len(sequence.completion_ids) for sequence in sampled),
            **{origin: float(length) for origin, length in lengths.items()},
        }
    )
    tokens = {origin: int(sums[origin]) for origin in lengths}
    metrics = {
        "rollout/on_policy": (sums["on_policy"], sums["sequences"]),
        "rollout/length_mean": (float(sum(tokens.values())), sums["sampled"]),
        "rollout/truncated_fraction": (sums["truncated"], sums["sampled"]),
        "rollout/entropy": (sums["entropy"], float(sum(tokens.values()))),
    }
    return {name: pair for name, pair in metrics.items() if pair[1]}, tokens
