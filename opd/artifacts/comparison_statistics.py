"""What a comparison computes: means and spreads over seeds, intervals over prompts. numpy alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opd.artifacts.table import to_number

RESAMPLES = 2000
BOOTSTRAP_SEED = 0
COVERAGE = 0.95
_DRAWN_TOGETHER = 2**20  # draws of rows that exist at once: 8 MB for each of the arrays

Column = dict[int, tuple[float, float]]
"""One metric by evaluation row: {row: (value, weight)}; the weight of what is counted in tokens is their number."""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the sample standard deviation (n - 1), which one seed does not have."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """A metric, or a difference of it, over the seeds: percentile interval over resampled prompts."""

    estimate: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    prompts: int

    @property
    def sd_over_seeds(self) -> float | None:
        """Sample standard deviation of the seeds' own values, None for one seed."""
        return spread(self.by_seed).sd

    @property
    def same_sign(self) -> int:
        """Seeds whose own value has the sign of the estimate."""
        return int((np.sign(self.by_seed) == np.sign(self.estimate)).sum())


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Spread(sum(values) / len(values), sd, len(values))


def weighted_mean(column: Column) -> float:
    """Σ weight·value / Σ weight."""
    return sum(value * weight for value, weight in column.values()) / sum(weight for _, weight in column.values())


def read_columns(file: Path) -> dict[str, Column]:
    """{metric: {row: (value, weight)}} of a scores-*.jsonl, in any order of its lines; {} where there is no file."""
    columns: dict[str, Column] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError:
        return {}
    for line in filter(None, lines):
        try:
            record = json.loads(line)
            row = int(record.pop("row"))
        except (ValueError, KeyError, AttributeError, TypeError):  # a file that was cut or edited pairs nothing
            return {}
        for name, value in record.items():
            if (number := to_number(value)) is None or (name.endswith("_tokens") and name[:-7] in record):
                continue
            weight = to_number(record.get(f"{name}_tokens", 1.0))
            columns.setdefault(name, {})[row] = (number, 1.0 if weight is None else weight)
    return columns


def interval(ours: Mapping[int, Column], theirs: Mapping[int, Column] | None = None) -> Interval:
    """Mean over the seeds of a metric, or of ours - theirs where both are given, by seed and matched by row.

    The interval is the percentile bootstrap over prompts: each resample draws as many rows as there are, with
    replacement, the same rows for both sides and all seeds, and recomputes the estimate. The seeds are held fixed, so
    it says nothing of other seeds. Of what is weighted by tokens each side is Σ weight·value / Σ weight. `ours` and
    `theirs` have the same seeds, at least one, and the same rows for each.
    """
    sides = [ours] if theirs is None else [ours, theirs]
    rows = sorted({row for side in sides for column in side.values() for row in column})
    parts = [np.array([_moments(side[seed], rows) for side in sides]) for seed in sorted(ours)]
    moments = np.stack(parts)  # (seeds, sides, 2, rows): weight·value and weight
    by_seed = _contrast(moments.sum(axis=-1))
    estimate = float(by_seed.mean())
    low = high = math.nan
    if np.isfinite(moments).all():
        resampled = _resampled(moments).mean(axis=-1)
        tail = (1 - COVERAGE) / 2
        # A resample without any row of some seed has no value.
        low, high = (float(bound) for bound in np.nanquantile(resampled, (tail, 1 - tail)))
    return Interval(estimate, low, high, tuple(by_seed.tolist()), len(rows))


def _moments(column: Column, rows: Sequence[int]) -> list[list[float]]:
    entries = [column.get(row, (0.0, 0.0)) for row in rows]
    return [[value * weight for value, weight in entries], [weight for _, weight in entries]]


def _contrast(sums: np.ndarray) -> np.ndarray:
    """(…, seeds, sides, 2) -> (…, seeds): the ratio of the one side, or the difference of both."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
    return ratios[..., 0] - ratios[..., 1] if ratios.shape[-1] == 2 else ratios[..., 0]


def _resampled(moments: np.ndarray) -> np.ndarray:
    """The contrast of every resample and seed, (RESAMPLES, seeds)."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    prompts = moments.shape[-1]
    flat = moments.reshape(-1, prompts).T
    step = max(1, _DRAWN_TOGETHER // prompts)
    found = []
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        found.append(_contrast((times.astype(float) @ flat).reshape(size, *moments.shape[:-1])))
    return np.concatenate(found)
