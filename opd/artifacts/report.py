"""report.html and report.md of a run folder: what was run, what changed, its cost, how to repeat it."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from opd.artifacts.plots import draw_plots
from opd.artifacts.run_record import RunRecord, read_run, series, step_of
from opd.artifacts.table import MetricRow, before_after_table, format_number, format_table, to_number
from opd.errors import ConfigError

__all__ = ["before_after_table", "format_table", "write_report"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PAIRS = 3
_ROLLOUTS = 6
_NAMING_KEYS = ("name", "path", "model", "id", "kind", "experiment")
# Columns of a sample with a place of their own in the page; the other scalars are shown as scores.
_SAMPLE_COLUMNS = {"step", "phase", "prompt", "completion", "origin", "finished", "reference"}


@dataclass(frozen=True)
class Sample:
    """One completion as the page shows it."""

    step: int | None
    prompt: str
    completion: str
    reference: str
    truncated: bool
    origin: str
    scores: list[tuple[str, str, str]]  # name, value, "good" | "bad" | ""


@dataclass(frozen=True)
class SamplePair:
    """What the student wrote for one prompt before and after; None where no such sample was kept."""

    prompt: str
    reference: str
    before: Sample | None
    after: Sample | None


def write_report(run_dir: Path) -> Path:
    """Writes report.html, report.md and plots/*.png into the run folder; returns the path of report.html.

    A run that was interrupted, or lost files, gets a report too: each section says what is missing.
    Raises ConfigError where the folder itself does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no folder; pass the run folder, which holds metrics.jsonl")
    record = read_run(run_dir)
    context = _context(record)
    context["plots"] = draw_plots(record.metrics, run_dir)
    templates = environment()
    for name in ("report.md", "report.html"):
        text = templates.get_template(f"{name}.j2").render(context)
        # Half of a surrogate pair, which a model that emits bytes can leave in a sample, has no UTF-8.
        (run_dir / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return run_dir / "report.html"


def environment() -> Environment:
    """The templates that lie beside this file; .html ones escape what they are given."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(number=format_number, fence=_fence, inline=_inline)
    return found


def _context(record: RunRecord) -> dict[str, Any]:
    headers, rows = _results(record)
    config = record.config
    return {
        "name": _named(_section(config, "run")) or record.folder.resolve().name,
        "method": _named(config.get("method")) or "unknown method",
        "student": _named(_section(config, "model").get("student")) or "unknown student",
        "teacher": _named(_section(config, "model").get("teacher")),
        "data": _named(config.get("data")) or "unknown data",
        "hardware": _named(config.get("hardware")) or "unknown hardware",
        "started": _text(record.provenance.get("started", "")),
        "finished": record.finished,
        "status": _status(record),
        "evaluation_only": _only_evaluates(record),
        "problems": record.problems,
        "headers": headers,
        "rows": rows,
        "facts": _facts(record),
        "last_step": record.last_step,
        "pairs": _pairs(record.samples),
        "rollouts": _rollouts(record.samples),
        "command": _command(record.provenance.get("command")),
        "commit": _text(record.provenance.get("commit", "")),
        "dirty": record.provenance.get("dirty") is True,
        "config_text": record.config_text.strip(),
        "provenance": _leaves(record.provenance),
    }


def _only_evaluates(record: RunRecord) -> bool:
    return record.config.get("mode") == "eval"


def _status(record: RunRecord) -> str:
    step = record.last_step
    if _only_evaluates(record):
        return "evaluation only, finished" if record.finished else "evaluation only, interrupted"
    if record.finished:
        return "finished" if step is None else f"finished at step {step:,}"
    return "interrupted before the first logged step" if step is None else f"interrupted at step {step:,}"


def _results(record: RunRecord) -> tuple[tuple[str, ...], list[MetricRow]]:
    """The column names and the rows; an interrupted run shows its evaluations during training."""
    if _only_evaluates(record):
        return ("value",), before_after_table(_section(record.result, "evaluation"), {})
    before, after = _section(record.result, "before"), _section(record.result, "after")
    headers: tuple[str, ...] = ("before", "after")
    if not after:
        keys = dict.fromkeys(key for line in record.metrics for key in line if key.startswith("eval/"))
        curves = {key.removeprefix("eval/"): points for key in keys if (points := series(record.metrics, key))}
        first = {name: points[0][1] for name, points in curves.items() if points[0][0] == 0}
        last_step = max((points[-1][0] for points in curves.values()), default=0)
        if last_step > 0:
            before = before or first
            after = {name: points[-1][1] for name, points in curves.items() if points[-1][0] == last_step}
            headers = ("before", f"step {last_step:,}")
    return headers, before_after_table(before, after)


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Label and value of what the run cost; what was not recorded is left out."""
    result = record.result
    seconds, training = to_number(result.get("seconds")), to_number(result.get("train_seconds"))
    tokens, parameters = to_number(result.get("tokens")), to_number(result.get("student_parameters"))
    paces = [pace for _, pace in series(record.metrics, "seconds_per_step")]
    facts = [
        ("wall time", _duration(seconds)),
        ("of it training", _duration(training)),
        ("optimizer steps", "" if not record.last_step else f"{record.last_step:,}"),
        ("median step", _duration(statistics.median(paces)) if paces else ""),
        ("training tokens", _quantity(tokens)),
        ("tokens per second", _quantity(tokens / training) if tokens and training else ""),
        ("student parameters", _quantity(parameters)),
    ]
    return [(label, value) for label, value in facts if value]


def _pairs(samples: list[dict[str, Any]]) -> list[SamplePair]:
    """The first prompts of the file, never the best ones: a report that picks its examples shows nothing."""
    before, after = _first_by_prompt(samples, "before", "evaluation"), _first_by_prompt(samples, "after")
    prompts = list(dict.fromkeys([*before, *after]))
    prompts.sort(key=lambda prompt: not (prompt in before and prompt in after))
    pairs = []
    for prompt in prompts[:_PAIRS]:
        one, other = before.get(prompt), after.get(prompt)
        reference = next((sample.reference for sample in (one, other) if sample and sample.reference), "")
        pairs.append(SamplePair(prompt, reference, one, other))
    return pairs


def _first_by_prompt(samples: list[dict[str, Any]], *phases: str) -> dict[str, Sample]:
    chosen: dict[str, Sample] = {}
    for line in samples:
        if line.get("phase") in phases:
            sample = _sample(line)
            chosen.setdefault(sample.prompt, sample)
    return chosen


def _rollouts(samples: list[dict[str, Any]]) -> list[Sample]:
    """The first training rollout of some steps, spread evenly from the first to the last."""
    first: dict[int, dict[str, Any]] = {}
    for line in samples:
        step = step_of(line)
        if line.get("phase") == "train" and step is not None:
            first.setdefault(step, line)
    steps = sorted(first)
    if len(steps) > _ROLLOUTS:
        steps = [steps[round(place * (len(steps) - 1) / (_ROLLOUTS - 1))] for place in range(_ROLLOUTS)]
    return [_sample(first[step]) for step in steps]


def _sample(line: dict[str, Any]) -> Sample:
    scores = []
    for key, value in line.items():
        if key in _SAMPLE_COLUMNS or (number := to_number(value)) is None:
            continue
        # Only a yes or no is coloured: of a graded score the page cannot know what is good.
        mood = {1.0: "good", 0.0: "bad"}.get(number, "")
        scores.append((str(key).replace("_", " "), "" if mood else format_number(number), mood))
    return Sample(
        step=step_of(line),
        prompt=_text(line.get("prompt", "")),
        completion=_text(line.get("completion", "")),
        reference=_text(line.get("reference", "")),
        truncated=line.get("finished") is False,
        origin=_text(line.get("origin", "")),
        scores=scores,
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        # Tab and newline aside, control characters are invisible in a page and illegal in some readers.
        return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", value)
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _section(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _named(value: Any) -> str:
    """How a config node calls itself: the string it is, or its name, path or kind."""
    if isinstance(value, Mapping):
        return next((_text(value[key]) for key in _NAMING_KEYS if value.get(key)), "")
    return _text(value) if value else ""


def _command(command: Any) -> str:
    if isinstance(command, list):
        return shlex.join(str(word) for word in command)
    return _text(command) if command else ""


def _leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of every leaf of nested dictionaries."""
    if isinstance(value, dict) and (value or not name):
        prefix = f"{name}." if name else ""
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}{key}")]
    return [(name, _text(value))]


def _duration(seconds: float | None) -> str:
    if seconds is None or not 0 <= seconds < float("inf"):
        return ""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _quantity(value: float | None) -> str:
    if value is None or not 0 <= value < float("inf"):
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scaled = value / (1e3 if unit == "k" else size)
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{value:,.0f}"


def _fence(text: str) -> str:
    """The text in a Markdown code block that no run of backticks inside can close."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def _inline(text: str) -> str:
    """The text on one line of Markdown, safe in a table cell."""
    line = " ".join(text.split())
    for sign in "\\|`<*[":
        line = line.replace(sign, "\\" + sign)
    return line
