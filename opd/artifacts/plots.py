"""The curves of a report: small panels over the optimizer step, only those for which something was logged."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd.artifacts.run_record import series
from opd.artifacts.table import direction_of

_SMOOTH_ABOVE = 50  # points; fewer are drawn as they are
COLOURS = ("#2563a8", "#d9772b", "#2f8f5b", "#8b5fbf", "#c2405a", "#6b7280")
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": "#b8bec8",
    "axes.labelcolor": "#4a5260",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e9ee",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#b8bec8",
    "ytick.color": "#b8bec8",
    "xtick.labelcolor": "#4a5260",
    "ytick.labelcolor": "#4a5260",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "opd",  # the same run gives the same bytes
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel. Evaluations get markers; neither they nor a schedule is noise to be smoothed."""

    key: str
    label: str
    colour: str
    sparse: bool = False
    noisy: bool = True


@dataclass(frozen=True)
class Plot:
    """One drawn panel: `png` relative to the run folder, `data_uri` an SVG that needs no other file."""

    name: str
    title: str
    description: str
    png: str
    data_uri: str


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    may_be_logarithmic: bool = False


def draw_plots(metrics: list[dict[str, Any]], run_dir: Path) -> list[Plot]:
    """Draws every panel that has data into `run_dir/plots`; an empty list where nothing was logged."""
    plots = []
    with matplotlib.rc_context(STYLE):
        for panel in _panels(metrics):
            curves = [(curve, points) for curve in panel.curves if (points := series(metrics, curve.key))]
            if curves:
                plots.append(_draw(panel, curves, run_dir))
    return plots


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average, as long as its input: at the ends it averages the neighbours there are."""
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.asarray(values, dtype=float), kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")


def _panels(metrics: list[dict[str, Any]]) -> list[_Panel]:
    blue, orange, green, purple, *_ = COLOURS
    logged = dict.fromkeys(key for line in metrics for key in line if isinstance(key, str))
    scores = [key for key in logged if key.startswith("eval/") and direction_of(key) == "higher"]
    score_curves = tuple(
        Curve(key, key.removeprefix("eval/").replace("_", " "), COLOURS[place % len(COLOURS)], sparse=True)
        for place, key in enumerate(scores)
    )
    losses = (
        Curve("train/loss", "training", blue),
        Curve("eval/loss", "evaluation", orange, sparse=True),
        Curve("eval/loss", "evaluation", orange, sparse=True),
    )
    divergences = (
        Curve("train/forward_kl", "forward KL, training", blue),
        Curve("eval/forward_kl", "forward KL, evaluation", blue, sparse=True),
        Curve("train/reverse_kl", "reverse KL, training", orange),
        Curve("eval/reverse_kl", "reverse KL, evaluation", orange, sparse=True),
    )
    shares = (
        Curve("rollout/truncated_fraction", "truncated", orange),
        Curve("rollout/on_policy", "on-policy", green),
    )
    return [
        _Panel("loss", "Loss", "loss", losses),
        _Panel("divergence", "Divergence from the teacher", "KL (nats)", divergences, may_be_logarithmic=True),
        _Panel("scores", "Task scores", "score", score_curves),
        _Panel("entropy", "Student entropy", "entropy (nats)", (Curve("train/entropy", "entropy", purple),)),
        _Panel(
            "length",
            "Rollout length",
            "tokens a rollout",
            (Curve("rollout/length_mean", "mean length", green),),
        ),
        _Panel("shares", "Shares of the rollouts", "fraction of rollouts", shares),
        _Panel("grad_norm", "Gradient norm", "gradient norm", (Curve("train/grad_norm", "norm", blue),), True),
        _Panel("lr", "Learning rate", "learning rate", (Curve("train/lr", "rate", purple, noisy=False),)),
    ]


def _draw(panel: _Panel, curves: list[tuple[Curve, list[tuple[int, float]]]], run_dir: Path) -> Plot:
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    notes = [note for curve, points in curves for note in _draw_curve(axes, curve, points)]
    if panel.may_be_logarithmic and _spans_decades(curves):
        axes.set_yscale("log")
        notes.append("logarithmic axis")
    if panel.name == "shares":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=1.8)
    folder = run_dir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{panel.name}.png", dpi=160)
    description = "; ".join(dict.fromkeys(notes))
    return Plot(panel.name, panel.title, description, f"plots/{panel.name}.png", data_uri(figure))


def _draw_curve(axes: Axes, curve: Curve, points: list[tuple[int, float]]) -> list[str]:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    notes = []
    if len(finite) < len(points):
        steps = [step for step, value in points if not math.isfinite(value)]
        # At the foot of the panel, in axis units: there is no height at which to draw a NaN.
        foot = axes.get_xaxis_transform()
        axes.plot(
            steps,
            [0.03] * len(steps),
            "x",
            color="#c0262d",
            transform=foot,
            label="nan or inf",
            clip_on=False,
        )
        notes.append(f"{curve.key} is nan or inf at {len(steps)} of {len(points)} logged steps (×)")
    if not finite:
        return notes
    steps, values = zip(*finite, strict=True)
    if curve.sparse:
        axes.plot(steps, values, "o--", color=curve.colour, label=curve.label, linewidth=1.2, markersize=4)
    elif curve.noisy and len(values) > _SMOOTH_ABOVE:
        window = max(9, len(values) // 25) | 1  # odd, so that it has a centre
        axes.plot(steps, values, color=curve.colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth(values, window), color=curve.colour, label=curve.label, linewidth=1.8)
        notes.append(f"smoothed over {window} points, raw in the background")
    else:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=curve.colour, label=curve.label, linewidth=1.8, marker=marker)
    return notes


def _spans_decades(curves: list[tuple[Curve, list[tuple[int, float]]]]) -> bool:
    values = [value for _, points in curves for _, value in points if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 50


def data_uri(figure: Figure) -> str:
    """The figure as an SVG that a page can hold."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
