"""Metrics before and after, and which way is better. No matplotlib here: the console prints this too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["higher", "lower", "neutral"]
Verdict = Literal["better", "worse", "same", "undefined", ""]

_HIGHER = {"success", "recovery", "optimal", "match", "agreement", "accuracy", "acc"}
_HIGHER |= {"f1", "em", "mcc", "bleu", "chrf", "rouge", "rouge1", "rouge2", "pass"}  # what lm-eval's tasks report
_LOWER = {"kl", "loss", "nll", "perplexity", "bits", "brier", "ter"}
_TASK = re.compile(r"(^|.*/)lm_eval/[^/]*/")  # a task's own name may hold any of these words
# What a reader looks for first; anything else follows in the order it was recorded.
_ORDER = (
    "success",
    "optimal",
    "recovery",
    "exact_match",
    "agreement",
    "forward_kl",
    "reverse_kl",
    "nll",
    "loss",
    "perplexity",
)
ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "neutral": ""}


@dataclass(frozen=True)
class MetricRow:
    """One metric; None where it was not recorded. `verdict` is empty for a neutral metric or a lone side."""

    metric: str
    before: float | None
    after: float | None
    difference: float | None
    direction: Direction
    verdict: Verdict

    @property
    def arrow(self) -> str:
        """↑ where higher is better, ↓ where lower is, nothing where neither is."""
        return ARROWS[self.direction]

    @property
    def cells(self) -> tuple[str, str, str]:
        """Before, after and the signed difference, as text."""
        return (
            format_number(self.before),
            format_number(self.after),
            format_number(self.difference, signed=True),
        )


def direction_of(metric: str) -> Direction:
    """Which way is better, by the words of the name: `forward_kl` lower, `success_greedy` higher."""
    words = set(re.split(r"[^a-z0-9]+", _TASK.sub("", metric.lower())))
    if "stderr" in words:
        return "neutral"
    if words & _LOWER:
        return "lower"
    return "higher" if words & _HIGHER else "neutral"


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[MetricRow]:
    """One row for each metric of either side, the known ones first. Nested metrics become `outer/inner`."""
    left, right = _flatten(before), _flatten(after)
    names = list(dict.fromkeys([*left, *right]))
    names.sort(key=_rank)
    return [_row(name, left.get(name), right.get(name)) for name in names]


def format_table(rows: Sequence[MetricRow], headers: tuple[str, ...] = ("before", "after")) -> str:
    """Plain text in aligned columns, with a line that explains the arrows. One header: the first side alone."""
    if not rows:
        return "no metrics recorded"
    shown = slice(3) if len(headers) > 1 else slice(1)
    lines = [("metric", *(*headers, "difference")[shown], "")]
    lines += [(f"{row.metric} {row.arrow}".rstrip(), *row.cells[shown], row.verdict) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    text = []
    for name, *numbers, verdict in lines:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *cells, verdict]).rstrip())
    return "\n".join([*text, "↑ higher is better, ↓ lower is better"])


def format_number(value: float | None, signed: bool = False) -> str:
    """A number short enough for a table; `nan` and `inf` stay visible, a missing one is a dash."""
    if value is None:
        return "—"
    sign = "+" if signed and value > 0 else ""
    if not math.isfinite(value):
        return f"{sign}{value}"
    size = abs(value)
    if size == 0 or 0.001 <= size < 10:
        digits = f"{value:.3f}"
    elif size < 0.001:
        digits = f"{value:.2g}"
    elif size < 1e6:
        digits = f"{value:,.2f}" if size < 100 else f"{value:,.1f}"
    else:
        digits = f"{value:.3e}"
    return sign + digits


def to_number(value: Any) -> float | None:
    """The value as a float, else None. Of strings only nan and inf are one: strict JSON quotes them."""
    if isinstance(value, str) and value.lower().lstrip("+-") not in {"nan", "inf", "infinity"}:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    flat: dict[str, float | None] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = to_number(value)
    return flat


def _rank(metric: str) -> int:
    return next((place for place, start in enumerate(_ORDER) if metric.startswith(start)), len(_ORDER))


def _row(metric: str, before: float | None, after: float | None) -> MetricRow:
    direction = direction_of(metric)
    difference = None if before is None or after is None else after - before
    return MetricRow(metric, before, after, difference, direction, _verdict(difference, direction))


def _verdict(difference: float | None, direction: Direction) -> Verdict:
    if difference is None or direction == "neutral":
        return ""
    if math.isnan(difference):
        return "undefined"
    if difference == 0:
        return "same"
    return "better" if (difference > 0) == (direction == "higher") else "worse"
