"""Runs side by side: means and spreads over seeds, what they cost, and paired differences with intervals.

What differs between two runs but is not what is compared (another budget, other data, another teacher) is said in the
notes, beside the numbers it touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.artifacts.comparison_plots import draw_comparison
from opd.artifacts.comparison_runs import Run, Setting, find_runs, group, load_runs, show
from opd.artifacts.comparison_statistics import Interval, interval, spread
from opd.artifacts.comparison_tables import (
    Table,
    cost_table,
    count,
    difference_table,
    metric_table,
    settings_table,
    wrap,
)
from opd.artifacts.folders import make_folder
from opd.artifacts.plots import Plot
from opd.artifacts.report import environment
from opd.artifacts.table import before_after_table, direction_of
from opd.config import did_you_mean
from opd.errors import ConfigError

_BUDGET_TOLERANCE = 0.10


@dataclass(frozen=True)
class Comparison:
    """Everything that is printed and written."""

    settings: list[Setting]
    baseline: Setting
    metrics: list[str]
    tables: list[Table]
    notes: list[str]
    differences: dict[str, dict[str, Interval]]  # setting's label -> metric -> difference to the baseline

    @property
    def text(self) -> str:
        """What the terminal shows."""
        parts = ["\n".join(filter(None, [t.title, t.text, t.caption and wrap(t.caption)])) for t in self.tables]
        return "\n\n".join([*parts, "\n".join(map(wrap, self.notes))]).rstrip()


def compare(
    paths: Sequence[Path], *, baseline: str | None = None, metrics: Sequence[str] = (), group_by: Sequence[str] = ()
) -> Comparison:
    """The comparison of all finished runs in these folders.

    `baseline`: the label, or the method, of the setting that the others are paired with; None: the sft one if there
    is one, else the first. Raises ConfigError where there is nothing to compare.
    """
    runs, left_out = load_runs(find_runs(paths))
    settings, repeated = group(runs, group_by)
    chosen, hidden = _metrics(runs, metrics)
    base = _baseline(settings, baseline)
    differences, refusals = _differences(settings, base, chosen)
    tables = [settings_table(settings), metric_table(settings, chosen), cost_table(settings)]
    if differences:
        tables.append(difference_table(settings, base, chosen, differences))
    notes = [*left_out, *repeated, *_budget_notes(settings), *_condition_notes(settings), *refusals]
    if hidden:
        notes.append(f"not shown: {', '.join(hidden)} (--metrics shows them)")
    return Comparison(settings, base, chosen, tables, notes, differences)


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes comparison.md, comparison.html and the plots into `folder`; returns the path of the page."""
    make_folder(folder, key=f"--out {folder}")
    context: dict[str, Any] = {"comparison": comparison, "plots": _plots(comparison, folder)}
    context["folders"] = [
        (setting.label, run.seed, str(run.folder)) for setting in comparison.settings for run in setting.runs
    ]
    templates = environment()
    for name in ("comparison.md", "comparison.html"):
        (folder / name).write_text(templates.get_template(f"{name}.j2").render(context), encoding="utf-8")
    return folder / "comparison.html"


def _plots(comparison: Comparison, folder: Path) -> list[Plot]:
    headline = comparison.metrics[0]
    means = {
        setting.label: interval({run.seed: run.columns[headline] for run in setting.runs})
        for setting in comparison.settings
        if all(headline in run.columns for run in setting.runs)
    }
    differences = {label: found[headline] for label, found in comparison.differences.items() if headline in found}
    return draw_comparison(
        comparison.settings,
        headline,
        means=means,
        differences=differences,
        baseline=comparison.baseline.label,
        folder=folder,
    )


def _metrics(runs: Sequence[Run], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is shown, the headline first, and what is not. Raises ConfigError where no metric is common to all runs."""
    known = [row.metric for row in before_after_table({}, {name: 0.0 for run in runs for name in run.scores})]
    common = [name for name in known if all(name in run.scores for run in runs)]
    if not common:
        raise ConfigError(
            "no metric is common to these runs: compare runs whose evaluation scores the same (evaluation.*)"
        )
    if wanted:
        if unknown := [name for name in wanted if name not in known]:
            raise ConfigError(f"--metrics {unknown[0]}: no run has it; {did_you_mean(unknown[0], known)}")
        if wanted[0] not in common:
            raise ConfigError(f"--metrics {wanted[0]}: not in every run; name one first that is: {', '.join(common)}")
        return list(dict.fromkeys(wanted)), []
    # Perplexity says what loss says.
    telling = [name for name in known if direction_of(name) != "neutral" and name != "perplexity"] or known
    if not set(telling) & set(common):
        telling = common
    telling.sort(key=lambda name: name not in common)
    return telling, [name for name in known if name not in telling]


def _baseline(settings: Sequence[Setting], name: str | None) -> Setting:
    if name is None:
        return next((setting for setting in settings if setting.method == "sft"), settings[0])
    if chosen := [s for s in settings if s.label == name] or [s for s in settings if s.method == name]:
        return chosen[0]
    raise ConfigError(f"--baseline {name}: no such setting; {did_you_mean(name, [s.label for s in settings])}")


def _differences(
    settings: Sequence[Setting], base: Setting, metrics: Sequence[str]
) -> tuple[dict[str, dict[str, Interval]], list[str]]:
    """Each setting against the baseline on the seeds that both have; a sentence for each that cannot be paired."""
    found: dict[str, dict[str, Interval]] = {}
    refusals = []
    for setting in settings:
        if setting is base:
            continue
        seeds = [seed for seed in setting.seeds if seed in base.by_seed]
        pairs = [(setting.by_seed[seed], base.by_seed[seed]) for seed in seeds]
        problem = next(filter(None, (_unpaired(*pair) for pair in pairs)), None) if pairs else "no seed in common"
        if problem:
            refusals.append(f"not paired: {setting.label} and {base.label}: {problem}")
            continue
        taught_alike = all(_teacher(ours) == _teacher(theirs) for ours, theirs in pairs)
        found[setting.label] = {
            metric: interval(
                {ours.seed: ours.columns[metric] for ours, _ in pairs},
                {theirs.seed: theirs.columns[metric] for _, theirs in pairs},
            )
            for metric in metrics
            if all(metric in run.columns for pair in pairs for run in pair)
            and (taught_alike or not _is_divergence(metric))
        }
    return {label: intervals for label, intervals in found.items() if intervals}, refusals


def _unpaired(ours: Run, theirs: Run) -> str | None:
    """Why the scores of two runs cannot be matched by row, None where they can."""
    for run in (ours, theirs):
        if not run.columns:
            return f"no readable scores-{run.phase}.jsonl in {run.folder}"
    mine, other = _evaluation(ours), _evaluation(theirs)
    for key in [*mine, *(key for key in other if key not in mine)]:
        if mine.get(key) != other.get(key):
            return f"other evaluation data: {key} is {show(mine.get(key))} and {show(other.get(key))}"
    for metric in ours.columns.keys() & theirs.columns.keys():
        if ours.columns[metric].keys() != theirs.columns[metric].keys():
            counts = f"{len(ours.columns[metric])} and {len(theirs.columns[metric])}"
            return f"other evaluation rows at seed {ours.seed} ({counts} of {metric})"
    return None


def _evaluation(run: Run) -> dict[str, Any]:
    """What a row's score depends on beside the model: the data, and how long an answer may be."""
    leaves, hashes = run.leaves, run.record.provenance.get("hashes")
    content = hashes.get("data") if isinstance(hashes, Mapping) else None
    unknown = not content or str(content).startswith("not a local")
    length = leaves.get("evaluation.max_completion_tokens") or leaves.get("rollout.max_completion_tokens")
    return {
        **{key: value for key, value in leaves.items() if key.startswith("data.") and key != "data.limit"},
        "data.path": leaves.get("data.path") if unknown else content,  # the same file may lie elsewhere
        "evaluation.max_completion_tokens": length,
    }


def _teacher(run: Run) -> Any:
    """What tells one teacher from another: the hashes of its weights where it was a folder, else its address."""
    hashes = run.record.provenance.get("hashes")
    files = hashes.get("teacher") if isinstance(hashes, Mapping) else None
    if isinstance(files, Mapping):
        return {name: value for name, value in files.items() if name.endswith((".safetensors", ".bin", ".index.json"))}
    return [run.leaves.get(f"model.teacher.{key}") for key in ("path", "revision")]


def _is_divergence(metric: str) -> bool:
    return metric.endswith("_kl")


def _budget_notes(settings: Sequence[Setting]) -> list[str]:
    tokens = {}
    for setting in settings:
        found = [v for run in setting.runs if (v := run.trained_tokens) is not None]
        if found and len(found) == len(setting.runs):
            tokens[setting.label] = spread(found).mean
    if len(tokens) < 2:
        return []
    least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
    if tokens[most] <= (1 + _BUDGET_TOLERANCE) * tokens[least]:
        return []
    more = f"{100 * (tokens[most] / tokens[least] - 1):+.0f} %" if tokens[least] else "any number"
    return [
        f"not the same budget: {count(tokens[least])} student tokens trained in {least}, {count(tokens[most])} in "
        f"{most} ({more})"
    ]


def _condition_notes(settings: Sequence[Setting]) -> list[str]:
    runs = [run for setting in settings for run in setting.runs]
    notes = []
    if len({tuple(setting.seeds) for setting in settings}) > 1:
        notes.append("not the same seeds: each mean is over its setting's own, each difference over those of both")
    if any(len(setting.runs) == 1 for setting in settings):
        single = ", ".join(setting.label for setting in settings if len(setting.runs) == 1)
        notes.append(f"one seed only: {single}; the spread over seeds is unknown")
    machines = list(dict.fromkeys(str(run.leaves.get("hardware.name", "unknown")) for run in runs))
    if len(machines) > 1:
        notes.append(f"not the same hardware: {', '.join(machines)}; their seconds do not compare")
    if any(_teacher(run) != _teacher(runs[0]) for run in runs):
        notes.append("not the same teacher: divergences are to each run's own, and are not paired")
    for name in dict.fromkeys(name for run in runs for name in run.unmatched if name in run.scores):
        labels = ", ".join(s.label for s in settings if any(name in run.unmatched for run in s.runs))
        notes.append(f"{name} not paired: in result.json of {labels} it is not the mean of the scores by row")
    commits = {
        str(code.get("commit")) for run in runs if isinstance(code := run.record.provenance.get("code"), Mapping)
    }
    if len(commits) > 1:
        notes.append(f"not the same code: {', '.join(sorted(commit[:7] for commit in commits))}")
    return notes
