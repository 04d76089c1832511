"""The pictures of a comparison: the headline metric and its differences, its curves, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from opd.artifacts.comparison_runs import Run, Setting
from opd.artifacts.comparison_statistics import Interval, spread
from opd.artifacts.plots import COLOURS, STYLE, Plot, data_uri
from opd.artifacts.run_record import series
from opd.artifacts.table import direction_of

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#6b7280"


def draw_comparison(
    settings: Sequence[Setting],
    metric: str,
    *,
    means: Mapping[str, Interval],
    differences: Mapping[str, Interval],
    baseline: str,
    folder: Path,
) -> list[Plot]:
    """Draws what there is data for into `folder`; `means` and `differences` of the metric by a setting's label."""
    looks = {
        setting.label: (COLOURS[place % len(COLOURS)], _MARKERS[(place // len(COLOURS)) % len(_MARKERS)])
        for place, setting in enumerate(settings)
    }
    plots = []
    with matplotlib.rc_context(STYLE):
        plots.append(_draw_headline(settings, metric, means, differences, baseline, looks, folder))
        if any(len(_curve(run, metric)) > 1 for setting in settings for run in setting.runs):
            plots.append(_draw_curves(settings, metric, looks, folder))
        if any(_cost(run) is not None for setting in settings for run in setting.runs):
            plots.append(_draw_cost(settings, metric, looks, folder))
    return plots


Looks = Mapping[str, tuple[str, str]]


def _draw_headline(
    settings: Sequence[Setting],
    metric: str,
    means: Mapping[str, Interval],
    differences: Mapping[str, Interval],
    baseline: str,
    looks: Looks,
    folder: Path,
) -> Plot:
    """One line a setting: seed points, mean, interval; beside it the paired differences to the baseline."""
    height = 1.3 + 0.42 * len(settings)
    figure = Figure(figsize=(9.6 if differences else 6.4, max(height, 2.4)), layout="constrained")
    panels = figure.subplots(1, 2 if differences else 1, sharey=True, squeeze=False)[0]
    for place, setting in enumerate(settings):
        values = [run.scores[metric] for run in setting.runs if metric in run.scores]
        _draw_row(panels[0], place, values, means.get(setting.label), *looks[setting.label])
        if differences:
            found = differences.get(setting.label)
            _draw_row(panels[1], place, found.by_seed if found else [], found, *looks[setting.label])
            if setting.label == baseline:
                note = {"xytext": (6, 0), "textcoords": "offset points", "color": _GREY, "fontsize": 8.5}
                panels[1].annotate("baseline", (0, place), va="center", **note)
    _mark_before(panels[0], settings, metric)
    panels[0].set_yticks(range(len(settings)), [setting.label for setting in settings])
    panels[0].set_ylim(len(settings) - 0.4, -0.6)
    panels[0].set_xlabel(_titled(metric))
    if differences:
        panels[1].axvline(0, color=_GREY, linewidth=1)
        panels[1].set_xlabel(f"{metric.replace('_', ' ')}:\ndifference to {baseline}, paired by prompt")
    for axes in panels:
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.08)
    drawn = "circle: a seed; bar: mean over seeds"
    drawn += "; line: 95 % interval over prompts" if means else ""
    return _saved(figure, "headline", f"{metric} of each setting", drawn, folder)


def _draw_row(
    axes: Axes, place: int, values: Sequence[float], found: Interval | None, colour: str, marker: str
) -> None:
    if found is not None and math.isfinite(found.low):
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        shifts = np.linspace(-0.16, 0.16, len(finite)) if len(finite) > 1 else np.zeros(1)
        style = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 5, "markeredgewidth": 1.1}
        axes.plot(finite, place + shifts, marker, linestyle="none", zorder=3, **style)
        axes.plot([spread(finite).mean], [place], "|", color=colour, markersize=17, markeredgewidth=2.6, zorder=4)


def _mark_before(axes: Axes, settings: Sequence[Setting], metric: str) -> None:
    before = [run.before[metric] for s in settings for run in s.runs if math.isfinite(run.before.get(metric, math.nan))]
    if before:
        mean = spread(before).mean
        axes.axvline(mean, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        upper = axes.get_xaxis_transform()
        axes.text(mean, 1.01, "before", transform=upper, ha="center", va="bottom", color=_GREY, fontsize=8.5)


def _draw_curves(settings: Sequence[Setting], metric: str, looks: Looks, folder: Path) -> Plot:
    """The evaluations during training over steps, and over tokens where they were logged."""

    def by_steps(run: Run) -> list[tuple[float, float]]:
        return [(float(step), value) for step, value in _curve(run, metric)]

    def by_tokens(run: Run) -> list[tuple[float, float]]:
        return _over_tokens(run, _curve(run, metric))

    panels: list[tuple[str, Callable[[Run], list[tuple[float, float]]]]] = [("optimizer step", by_steps)]
    if any(by_tokens(run) for setting in settings for run in setting.runs):
        panels.append(("student tokens trained", by_tokens))
    figure = Figure(figsize=(4.8 * len(panels), 3.4), layout="constrained")
    for axes, (unit, points_of) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for setting in settings:
            colour, marker = looks[setting.label]
            curves = [points for run in setting.runs if (points := points_of(run))]
            for points in curves:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.9)
            if mean := _mean_curve(curves):
                style = {"markersize": 4, "linewidth": 1.7, "marker": marker}
                axes.plot(*zip(*mean, strict=True), color=colour, label=setting.label, **style)
        axes.set_xlabel(unit)
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.axes[0].set_ylabel(_titled(metric))
    _legend(figure)
    drawn = "thick: mean over seeds; thin: a seed"
    return _saved(figure, "curves", f"{metric} during training", drawn, folder)


def _draw_cost(settings: Sequence[Setting], metric: str, looks: Looks, folder: Path) -> Plot:
    """The metric against the seconds that training took, upstream stages with it."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    costs = []
    for setting in settings:
        colour, marker = looks[setting.label]
        points = [(cost, run.scores[metric]) for run in setting.runs if (cost := _cost(run)) and metric in run.scores]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            axes.plot(*zip(*points, strict=True), marker, linestyle="none", color=colour, alpha=0.35, markersize=4.5)
            centre = [spread(side).mean for side in zip(*points, strict=True)]
            style = {"markersize": 9, "markeredgecolor": "white", "label": setting.label}
            axes.plot([centre[0]], [centre[1]], marker, linestyle="none", color=colour, **style)
            costs += [cost for cost, _ in points]
    if costs and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training, upstream stages included")
    axes.set_ylabel(_titled(metric))
    axes.grid(visible=True, axis="both")
    _legend(figure)
    drawn = "large: mean over seeds; small: a seed; seconds compare only on the same hardware, otherwise idle"
    return _saved(figure, "cost", f"{metric} against its cost", drawn, folder)


def _titled(metric: str) -> str:
    better = {"higher": " (higher is better)", "lower": " (lower is better)", "neutral": ""}[direction_of(metric)]
    return metric.replace("_", " ") + better


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 0:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4), columnspacing=1.4)


def _cost(run: Run) -> float | None:
    seconds = run.spent("train_seconds")
    return None if not seconds else seconds + (run.upstream_seconds or 0.0)


def _curve(run: Run, metric: str) -> list[tuple[int, float]]:
    return [(step, v) for step, v in series(run.record.metrics, f"eval/{metric}") if math.isfinite(v)]


def _over_tokens(run: Run, curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """The curve with each step replaced by the tokens trained until then; [] where none were logged.

    A logged step stands for those since the line before it; the run's own total sets the scale.
    """
    logged = [(step, tokens) for step, tokens in series(run.record.metrics, "train/tokens") if step > 0]
    total = run.trained_tokens
    if not logged or not total:
        return []
    steps = np.array([0, *(step for step, _ in logged)])
    tokens = np.concatenate([[0.0], np.cumsum(np.diff(steps) * np.array([value for _, value in logged]))])
    if not tokens[-1] > 0:
        return []
    return [(float(np.interp(step, steps, tokens)) * total / tokens[-1], value) for step, value in curve]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean of the k-th evaluations, as far as all seeds have them."""
    return [(spread(xs).mean, spread(ys).mean) for xs, ys in (zip(*p, strict=True) for p in zip(*curves, strict=False))]


def _saved(figure: Figure, name: str, title: str, description: str, folder: Path) -> Plot:
    figure.savefig(folder / f"{name}.png", dpi=160)
    return Plot(name, title, description, f"{name}.png", data_uri(figure))
