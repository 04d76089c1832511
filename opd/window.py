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
from opd.data.collate import lay_out
from opd.models import Vocabulary
from opd.protocols import Batch, Example, ExampleSet, Layout, Method, TokenSequence
from opd.randomness import permutation
from opd.sources import SequenceSource
from opd.sources.rollouts import Completion
from opd.teachers import Teacher


@dataclass
class Window:
    """One optimizer step: this rank's micro-batches, and counts and metrics of all ranks."""

    batches: list[Batch]
    counts: dict[str, float]
    metrics: dict[str, float]
    sequences: list[TokenSequence] = field(default_factory=list)


class RowOrder:
    """Which row the n-th prompt of the run is: pass after pass over the data, each in an order of its own.

    The last step of the last pass is filled from the next one, so that every step has the same number of prompts.
    """

    def __init__(self, examples: ExampleSet, seed: int) -> None:
        self._examples, self._seed = examples, seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> Example:
        epoch, position = divmod(number, len(self._examples))
        if epoch not in self._passes:
            self._passes = {epoch: permutation(len(self._examples), self._seed, "row_order", epoch)}
        return self._examples[int(self._passes[epoch][position])]


class WindowBuilder:
    """Builds windows in the order of the steps; `logprobs` scores a layout with the student as it is now."""

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
        student_logprobs: Callable[[Layout], Tensor],
    ) -> None:
        self._config, self._method, self._source, self._teachers = config, method, source, teachers
        self._vocabulary, self._device, self._student_logprobs = vocabulary, device, student_logprobs
        self._order = RowOrder(examples, config.run.seed)
        self._pending: list[tuple[list[TokenSequence], dict[str, float]]] = []
        ranks = distributed.world_size()
        self._prompts_per_rank = config.train.batch_size // ranks
        per_rank = self._prompts_per_rank * config.rollout.group_size * method.needs.sequences_per_row
        self.num_micro_batches = -(-per_rank // config.train.micro_batch_size)

    def __call__(self, step: int) -> Window:
        """The window of this step (0-based). Collective: every rank calls it for every step."""
        if not self._pending:
            self._pending = self._produce(step)
        sequences, metrics = self._pending.pop(0)
        size = self._config.train.micro_batch_size
        batches = [self._batch(sequences[start : start + size]) for start in range(0, len(sequences), size)]
        counts = {"tokens": self._normalizing_count(sequences), **self._method.counts(sequences)}
        counts["loss_tokens"] = float(sum(sequence.num_loss_tokens for sequence in sequences))
        return Window(batches, _total(counts), metrics, sequences)

    def save(self, folder: Path) -> None:
        """Keep rollouts that a later substep needs: the weights that made them are gone by then."""
        if self._pending:
            torch.save(self._pending, folder / f"rollouts-{distributed.rank()}.pt")

    def load(self, folder: Path) -> None:
        """Take them up again."""
        saved = folder / f"rollouts-{distributed.rank()}.pt"
        if saved.exists():
            self._pending = torch.load(saved, weights_only=False)

    def _produce(self, step: int) -> list[tuple[list[TokenSequence], dict[str, float]]]:
        """The sequences of the next num_substeps steps, scored by the models as they are at the first of them."""
        substeps, batch_size = self._method.needs.num_substeps, self._config.train.batch_size
        parts, sampled = [], []
        for substep in range(substeps):
            first = (step + substep) * batch_size + distributed.rank() * self._prompts_per_rank
            numbers = range(first, first + self._prompts_per_rank)
            sequences, completions = self._source.sequences([(number, self._order[number]) for number in numbers])
            parts.append(sequences)
            sampled.append(completions)
        metrics = [_rollout_metrics(sequences, done) for sequences, done in zip(parts, sampled, strict=True)]
        if self._method.needs.window:
            everything = [sequence for part in parts for sequence in part]
            self._score(everything)
            window_metrics = self._method.window(everything, distributed.total)
            metrics = [{**own, **{f"train/{name}": value for name, value in window_metrics.items()}} for own in metrics]
        return list(zip(parts, metrics, strict=True))

    @torch.no_grad()
    def _score(self, sequences: list[TokenSequence]) -> None:
        """Token log-probabilities of student and teachers, as numbers a loss token."""
        scorers = {
            "student": self._student_logprobs,
            **{name: t.logprobs for name, t in self._teachers.items()},
        }
        size = self._config.train.micro_batch_size
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            layout, views = self._layout(part), self._views(part)
            lengths = [sequence.num_loss_tokens for sequence in part]
            for name, scorer in scorers.items():
                values_of = scorer(views.get(name, layout)).cpu().split(lengths)
                for sequence, values in zip(part, values_of, strict=True):
                    sequence.token_scores[f"{name}_logprobs"] = values

    def _layout(self, sequences: Sequence[TokenSequence], name: str | None = None) -> Layout:
        """As the student reads them, or as the teacher of that name does."""
        views = [sequence.views[name] if name else sequence.student_view for sequence in sequences]
        return lay_out(views, pad_id=self._vocabulary.pad_id, device=self._device)

    def _views(self, sequences: Sequence[TokenSequence]) -> dict[str, Layout]:
        return {name: self._layout(sequences, name) for name in (sequences[0].views if sequences else ())}

    def _batch(self, sequences: list[TokenSequence]) -> Batch:
        names = sequences[0].token_scores if sequences else {}
        scores = {name: torch.cat([s.token_scores[name] for s in sequences]).to(self._device) for name in names}
        weights = None
        if self._config.method.loss_normalization == "sequence":
            lengths = [sequence.num_loss_tokens for sequence in sequences]
            weights = torch.tensor([1.0 / n for n in lengths for _ in range(n)], device=self._device)
        return Batch(sequences, self._layout(sequences), self._views(sequences), scores, weights)

    def _normalizing_count(self, sequences: Sequence[TokenSequence]) -> float:
        """What `loss_normalization` divides by, of this rank's sequences."""
        kind = self._config.method.loss_normalization
        if kind == "token":
            return float(sum(sequence.num_loss_tokens for sequence in sequences))
        if kind == "sequence":
            return float(sum(sequence.num_loss_tokens > 0 for sequence in sequences))
        if kind == "constant":
            return float(len(sequences) * self._config.rollout.max_completion_tokens)
        return 1.0 / distributed.world_size()


def _total(counts: dict[str, float]) -> dict[str, float]:
    summed = distributed.total(torch.tensor(list(counts.values()), dtype=torch.float64))
    return dict(zip(counts, summed.tolist(), strict=True))


def _rollout_metrics(sequences: Sequence[TokenSequence], sampled: Sequence[Completion]) -> dict[str, float]:
    """Length, truncation, entropy and on-policy share of one step's sequences, over all ranks."""
    sums = _total(
        {
            "sequences": float(len(sequences)),
            "student": float(sum(sequence.origin == "student" for sequence in sequences)),
            "sampled": float(len(sampled)),
            "truncated": float(sum(not completion.finished for completion in sampled)),
            "length": float(sum(len(completion.ids) for completion in sampled)),
            "entropy": sum(completion.entropy for completion in sampled),
        }
    )
    metrics = {"rollout/on_policy": sums["student"] / max(sums["sequences"], 1.0)}
    if sums["sampled"]:
        metrics["rollout/length_mean"] = sums["length"] / sums["sampled"]
        metrics["rollout/truncated_fraction"] = sums["truncated"] / sums["sampled"]
        metrics["rollout/entropy"] = sums["entropy"] / sums["sampled"]
    return metrics
