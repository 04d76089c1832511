"""What a run folder holds, read forgivingly: a report is wanted most of a run that broke."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd.artifacts.table import to_number


@dataclass
class RunRecord:
    """The parsed files of one run; `problems` says, in a sentence each, what was missing or unreadable."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The last optimizer step that was logged, None where none was."""
        return max((step for line in self.metrics if (step := step_of(line)) is not None), default=None)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: its wall time is the last thing that result.json is given."""
        return "seconds" in self.result


def read_run(folder: Path) -> RunRecord:
    """Everything readable in `folder`; nothing missing or malformed raises."""
    record = RunRecord(folder)
    record.config_text = _read_text(record, "config.yaml")
    record.config = _as_dict(record, "config.yaml", _parse_yaml(record, record.config_text))
    record.provenance = _as_dict(record, "provenance.json", _read_json(record, "provenance.json"))
    record.result = _as_dict(record, "result.json", _read_json(record, "result.json"))
    record.metrics = _read_lines(record, "metrics.jsonl")
    record.samples = _read_lines(record, "samples.jsonl")
    return record


def step_of(line: dict[str, Any]) -> int | None:
    """The step of a logged line, None where it has none."""
    step = to_number(line.get("step"))
    return int(step) if step is not None and abs(step) < 2**53 else None


def series(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of one metric by step; of a step logged again after a resume, the later value."""
    points: dict[int, float] = {}
    for line in metrics:
        step, value = step_of(line), to_number(line.get(key))
        if step is not None and value is not None:
            points[step] = value
    return sorted(points.items())


def _read_text(record: RunRecord, name: str) -> str:
    try:
        return (record.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        record.problems.append(f"{name} is missing.")
    except OSError as error:
        record.problems.append(f"{name} cannot be read: {error.strerror}.")
    return ""


def _read_json(record: RunRecord, name: str) -> Any:
    text = _read_text(record, name)
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        record.problems.append(f"{name} is not valid JSON: {error}.")
        return {}


def _parse_yaml(record: RunRecord, text: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        record.problems.append(f"config.yaml is not valid YAML: {' '.join(str(error).split())}.")
        return {}


def _as_dict(record: RunRecord, name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    record.problems.append(f"{name} holds a {type(value).__name__} where keys and values belong.")
    return {}


def _read_lines(record: RunRecord, name: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    skipped = 0
    # Not splitlines(): it also breaks at U+2028 and the like, which JSON leaves bare inside strings.
    for text in _read_text(record, name).split("\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            skipped += 1
    if skipped:
        # A killed process leaves half a last line.
        record.problems.append(f"{name}: {skipped} unreadable line{'s' * (skipped > 1)} skipped.")
    return lines


def last_note(folder: Path) -> str | None:
    """What a run's log ends with, if that is why it failed."""
    file = folder / "training.log"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    *_, level, last = ["", *re.split(r"^[-\d]+ [:,\d]+ ([A-Z]+) ", text, flags=re.MULTILINE)]
    return last.partition("\n")[0] if level == "ERROR" else None
