"""The tables of a comparison, as the terminal, the page and the Markdown show them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opd.artifacts.comparison_runs import EVALUATION, Run, Setting, differing_keys, show
from opd.artifacts.comparison_statistics import BOOTSTRAP_SEED, COVERAGE, RESAMPLES, Interval, spread
from opd.artifacts.table import ARROWS, direction_of, format_number

WIDTH = 120


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first `names` columns are words, the others numbers. `moods`: a row's better or worse."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    names: int = 1
    caption: str = ""
    moods: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Aligned columns; those that do not fit in the width follow below, with the names again."""
        rows = self._wrapped() if self.names == len(self.headers) else [self.headers, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        named, numbers = range(self.names), range(self.names, len(self.headers))
        blocks: list[list[int]] = [[*named]]
        for place in numbers:
            if len(blocks[-1]) > self.names and sum(widths[i] + 2 for i in [*blocks[-1], place]) - 2 > WIDTH:
                blocks.append([*named])
            blocks[-1].append(place)
        return "\n\n".join("\n".join(_line(row, widths, block, self.names) for row in rows) for block in blocks)

    def _wrapped(self) -> list[list[str]]:
        """Rows of words alone, the last column on as many lines as it needs."""
        left = [max(map(len, column)) for column in zip(self.headers[:-1], *(r[:-1] for r in self.rows), strict=True)]
        room = max(40, WIDTH - sum(width + 2 for width in left))
        lines = [self.headers]
        for row in self.rows:
            first, *rest = textwrap.wrap(row[-1], room) or [""]
            lines += [[*row[:-1], first], *([*[""] * len(left), line] for line in rest)]
        return lines


def wrap(text: str) -> str:
    """A paragraph in the width of the tables."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _line(row: Sequence[str], widths: Sequence[int], shown: Sequence[int], names: int) -> str:
    cells = [row[i].ljust(widths[i]) if i < names else row[i].rjust(widths[i]) for i in shown]
    return "  ".join(cells).rstrip()


def settings_table(settings: Sequence[Setting]) -> Table:
    """Label, seeds, and every key in which a setting differs from another, method keys or not."""
    rows = []
    for setting in settings:
        alike = [other for other in settings if (other.method == EVALUATION) == (setting.method == EVALUATION)]
        keys = [key for key in differing_keys(alike) if key in setting.keys and key != "method.name"]
        told = ", ".join(f"{key}={show(setting.keys[key])}" for key in keys) or "–"
        rows.append([setting.label, ", ".join(map(str, setting.seeds)), told])
    return Table("Settings", ["setting", "seeds", "what differs"], rows, names=3)


def metric_table(settings: Sequence[Setting], metrics: Sequence[str]) -> Table:
    """Mean ± sd over seeds, the students before training first."""
    rows = [
        [label, str(n), *(_cell([values[m] for values in scores if m in values], n) for m in metrics)]
        for label, n, scores in [
            *_before(settings),
            *((s.label, len(s.runs), [run.scores for run in s.runs]) for s in settings),
        ]
    ]
    headers = ["setting", "seeds", *(f"{metric} {ARROWS[direction_of(metric)]}".rstrip() for metric in metrics)]
    caption = (
        "Mean ± sample standard deviation over the seeds; one seed has no ±. ↑ higher is better, ↓ lower is better. "
        "Divergences and losses in nats a token."
    )
    return Table("Metrics", headers, rows, caption=caption)


def _before(settings: Sequence[Setting]) -> list[tuple[str, int, list[dict[str, float]]]]:
    """The students before training: one row for settings that began from the same ones, seed by seed.

    Of metrics that only some methods measure (their own loss, say) the row says nothing.
    """
    starts: list[tuple[list[str], dict[int, dict[str, float]]]] = []
    for setting in settings:
        mine = {run.seed: run.before for run in setting.runs if run.before}
        for labels, theirs in starts:
            shared = mine.keys() & theirs.keys()
            if shared and all(_alike(mine[seed], theirs[seed]) for seed in shared):
                labels.append(setting.label)
                for seed, metrics in mine.items():
                    known = theirs.get(seed, metrics)
                    theirs[seed] = {name: value for name, value in known.items() if name in metrics}
                break
        else:
            if mine:
                starts.append(([setting.label], mine))
    names = ["before training"] if len(starts) == 1 else [_before_name(labels) for labels, _ in starts]
    return [(name, len(found), list(found.values())) for name, (_, found) in zip(names, starts, strict=True)]


def _alike(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """In all that both measured, up to the order of a sum, which changes with the number of ranks."""
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(math.isclose(ours[name], theirs[name], rel_tol=1e-6) for name in shared)


def _before_name(labels: Sequence[str]) -> str:
    return f"before: {labels[0]}" + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


def _cell(values: Sequence[float], n: int, form: Callable[[float], str] = format_number) -> str:
    """Mean ± sd; a dash where not all runs have the number."""
    if not values or len(values) < n:
        return "—"
    found = spread(values)
    return form(found.mean) + ("" if found.sd is None else f" ± {form(found.sd)}")


def cost_table(settings: Sequence[Setting]) -> Table:
    """Steps, tokens of student and teacher, and seconds of a run: mean ± sd over seeds, no ± where all are equal."""
    columns: dict[str, tuple[Callable[[Run], float | None], Callable[[float], str]]] = {
        "steps": (lambda run: run.spent("steps"), count),
        "student trained": (lambda run: run.trained_tokens, count),
        "student sampled": (lambda run: run.spent("student_sampled_tokens"), count),
        "teacher sampled": (lambda run: run.spent("teacher_sampled_tokens"), count),
        "teacher scored": (lambda run: run.spent("teacher_scored_tokens"), count),
        "train s": (lambda run: run.spent("train_seconds"), _seconds),
        "total s": (lambda run: run.spent("seconds"), _seconds),
        "upstream s": (lambda run: run.upstream_seconds, _seconds),
    }
    if not any(run.upstream_seconds is not None for setting in settings for run in setting.runs):
        del columns["upstream s"]
    rows = []
    for setting in settings:
        found = [[v for run in setting.runs if (v := get(run)) is not None] for get, _ in columns.values()]
        forms = [form for _, form in columns.values()]
        cells = [_cell(values, len(setting.runs), form) for values, form in zip(found, forms, strict=True)]
        cells = [cell.removesuffix(" ± 0") for cell in cells]
        rows.append([setting.label, *cells])
    caption = (
        "Trained, sampled and scored are tokens of a run. Total: from start to report, evaluations too. "
        "A dash: not recorded."
    )
    if "upstream s" in columns:
        caption += " Upstream: the earlier stages that the run is built on, also where they were reused."
    return Table("Cost of a run", ["setting", *columns], rows, caption=caption)


def difference_table(
    settings: Sequence[Setting],
    base: Setting,
    metrics: Sequence[str],
    differences: Mapping[str, Mapping[str, Interval]],
) -> Table:
    """Each metric's paired differences to the baseline, and below what their intervals cover and what not."""
    shown = [
        (metric, setting.label, found)
        for metric in metrics
        for setting in settings
        if (found := differences.get(setting.label, {}).get(metric)) is not None
    ]
    moods = [_mood(metric, found) for metric, _, found in shown]
    rows = [_difference_row(*entry, mood) for entry, mood in zip(shown, moods, strict=True)]
    prompts, seeds = (
        " or ".join(f"{n:,}" for n in sorted(set(counts)))
        for counts in ([found.prompts for *_, found in shown], [len(found.by_seed) for *_, found in shown])
    )
    caption = (
        f"Interval: 95 %, percentile bootstrap over the evaluation prompts ({prompts}), {RESAMPLES} resamples, "
        f"generator seed {BOOTSTRAP_SEED}. It covers the choice of prompts, with the trained models held fixed. It "
        f"does not cover the seeds (n = {seeds}): for them see seed sd, the sample standard deviation of the seeds' "
        f"own differences, and same sign, the seeds whose own goes the same way. Verdict: by the interval alone. "
        f"Of {len(rows)} such intervals about {len(rows) * (1 - COVERAGE):.2g} would leave out the truth by chance."
    )
    headers = ["metric", "setting", "difference", "95 % interval", "seed sd", "same sign", "verdict"]
    return Table(f"Differences to {base.label}, paired by prompt and seed", headers, rows, 2, caption, moods)


def _difference_row(metric: str, label: str, found: Interval, mood: str) -> list[str]:
    sd = found.sd_over_seeds
    return [
        f"{metric} {ARROWS[direction_of(metric)]}".rstrip(),
        label,
        format_number(found.estimate, signed=True),
        f"[{format_number(found.low, signed=True)}, {format_number(found.high, signed=True)}]",
        "—" if sd is None else format_number(sd),
        f"{found.same_sign} of {len(found.by_seed)}",
        mood or "unclear",
    ]


def _mood(metric: str, found: Interval) -> str:
    """Better or worse where the interval leaves out 0."""
    if not (found.low > 0 or found.high < 0):
        return ""
    way = direction_of(metric)
    if way == "neutral":
        return "higher" if found.low > 0 else "lower"
    return "better" if (found.low > 0) == (way == "higher") else "worse"


def count(value: float) -> str:
    """A number of tokens or steps, in full up to ten millions."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= max(unit, 1e7):
            return f"{value / unit:.4g} {name}"
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
