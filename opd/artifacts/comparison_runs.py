"""Runs to compare: found in folders, grouped into settings that differ in nothing but the seed, and labelled."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from opd.artifacts.comparison_statistics import Column, read_columns, weighted_mean
from opd.artifacts.run_folder import STAGES
from opd.artifacts.run_record import RunRecord, last_note, read_run
from opd.artifacts.table import before_after_table, to_number
from opd.errors import ConfigError

# Where a run writes, what it is called, and on what it computes: not what is compared.
_ASIDE = ("run.", "tracking.", "artifacts.", "hardware.")
_WITHOUT_EFFECT = {
    "train.micro_batch_size",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.sample_every_steps",
    "train.eval_every_steps",
    "rollout.batch_size",
    "evaluation.batch_size",
    "model.student.gradient_checkpointing",
}
# All that an evaluation alone depends on.
_EVALUATED = ("mode", "model.", "data.", "evaluation.", "rollout.max_completion_tokens")
_OF_STAGE = re.compile(r"^stages\.[^.]+\.")
_LONGEST_LABEL = 40
EVALUATION = "eval"  # what stands for the method of a run that trains nothing


@dataclass
class Run:
    """A finished run. `leaves` is its config, flat; `phase` the evaluation it is judged by."""

    record: RunRecord
    leaves: dict[str, Any]
    seed: int
    phase: str
    before: dict[str, float]
    scores: dict[str, float]
    upstream_seconds: float | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.record.folder

    @property
    def method(self) -> str:
        """The method's name; a run of mode=eval has none."""
        return (
            EVALUATION if self.leaves.get("mode") == "eval" else str(self.leaves.get("method.name", "unknown method"))
        )

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Scores by evaluation row of the metrics that they average to, {} where the run kept none."""
        return {name: column for name, column in self._kept.items() if self._averages_to(column, name)}

    @property
    def unmatched(self) -> list[str]:
        """Metrics whose scores by row are of another quantity than result.json's."""
        return [name for name in self._kept if name not in self.columns]

    @cached_property
    def _kept(self) -> dict[str, Column]:
        return read_columns(self.folder / f"scores-{self.phase}.jsonl")

    def _averages_to(self, column: Column, name: str) -> bool:
        mean, stated = weighted_mean(column), self.scores.get(name, math.inf)
        return math.isclose(mean, stated, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(mean) and math.isnan(stated))

    def spent(self, name: str) -> float | None:
        """A number of the ledger, or of result.json itself; None where it was not recorded."""
        ledger = self.record.result.get("ledger")
        return to_number((ledger if isinstance(ledger, Mapping) else {}).get(name, self.record.result.get(name)))

    @property
    def trained_tokens(self) -> float | None:
        """Loss tokens that the student was trained on."""
        counted = self.spent("student_trained_tokens")
        return self.spent("tokens") if counted is None else counted


@dataclass
class Setting:
    """Runs that differ in the seed alone, by seed. `keys` are what tells it from other settings."""

    runs: list[Run]
    keys: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def method(self) -> str:
        """The method that all its runs have."""
        return self.runs[0].method

    @property
    def by_seed(self) -> dict[int, Run]:
        """{seed: run}."""
        return {run.seed: run for run in self.runs}

    @property
    def seeds(self) -> list[int]:
        """Ascending."""
        return [run.seed for run in self.runs]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders among these folders and below them, each once, in the order given and then of their names.

    Raises ConfigError for a path that is no folder, or in which there is no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            problem = "is a file" if path.exists() else "no such folder"
            raise ConfigError(f"{path}: {problem}; pass run folders, a multirun folder, or a folder above them")
        below = list(_runs_below(path))
        if not below:
            raise ConfigError(f"{path}: no run in it (a run folder has the config.yaml that python -m opd writes)")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def load_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs that measured something, and why each other is left out. Raises ConfigError if none remains."""
    runs, left_out = [], []
    for folder in folders:
        run = _run(read_run(folder))
        if run.record.finished and run.scores:
            runs.append(run)
        elif run.record.finished:
            left_out.append(f"{folder} is finished and measured nothing (mode={run.leaves.get('mode')})")
        else:
            step = run.record.last_step
            where = "before its first step" if step is None else f"at step {step:,}"
            why = f"; it ended with: {note}" if (note := last_note(Path(folder))) else ""
            told = f"it stands {where}{why}; its command with this run.dir continues it"
            left_out.append(f"{folder} is not finished ({told})")
    if not runs:
        count = f"; none of the {len(folders)} runs can be compared" if len(folders) > 1 else ""
        raise ConfigError(f"{left_out[0]}{count}")
    return runs, [f"left out: {reason}" for reason in left_out]


def group(runs: Sequence[Run], group_by: Sequence[str] = ()) -> tuple[list[Setting], list[str]]:
    """Settings by method, then by the keys that tell them apart, and a sentence for each run that repeats another.

    `group_by`: only these keys, and the method, tell settings apart. Raises ConfigError for a key that no run has, and
    where it puts two different runs of one seed together: their spread would not be one over seeds.
    """
    kept = _kept_leaves(runs)
    for key in group_by:
        if not any(key in leaves for leaves in kept):
            raise ConfigError(f"--group-by {key}: no run has this key; write it as in config.yaml, as in method.beta")
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    for run, leaves in zip(runs, kept, strict=True):
        telling = {key: leaves.get(key) for key in group_by} if group_by else leaves
        groups[run.method + json.dumps(telling, sort_keys=True, default=str)].append((run, leaves))
    settings, repeated = [], []
    for members in groups.values():
        by_seed: dict[int, tuple[Run, dict[str, Any]]] = {}
        for run, leaves in members:
            first, theirs = by_seed.setdefault(run.seed, (run, leaves))
            if theirs != leaves:
                key = _differing([theirs, leaves])[0]
                raise ConfigError(
                    f"--group-by: {first.folder} and {run.folder} would be one setting with seed {run.seed} twice, but "
                    f"differ in {key}; add {key}"
                )
            if first is not run:
                repeated.append(f"left out: {run.folder} repeats {first.folder} (same setting, same seed)")
        keys = {key: by_seed[min(by_seed)][1].get(key) for key in group_by or by_seed[min(by_seed)][1]}
        settings.append(Setting([by_seed[seed][0] for seed in sorted(by_seed)], keys))
    return _labelled(settings), repeated


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf}; a null leaf is as good as none."""
    if isinstance(value, Mapping):
        return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}{name}.").items()}
    return {} if value is None else {prefix.rstrip("."): value}


def show(value: Any) -> str:
    """A config value as a label has it: 1 for 1.0, the last part of a path."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name or value if isinstance(value, str) else json.dumps(value, default=str)


def differing_keys(settings: Sequence[Setting]) -> list[str]:
    """Keys in which these settings differ."""
    return _differing([setting.keys for setting in settings])


def _runs_below(path: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(path):
        if "config.yaml" in files and _is_run(Path(where)):
            folders.clear()  # what lies in a run's folder belongs to it
            yield Path(where)
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_run(folder: Path) -> bool:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"run", "method"} <= config.keys()


def _run(record: RunRecord) -> Run:
    trained = bool(record.result.get("after"))
    phases = ("before", "after") if trained else ("evaluation", "")
    before, after = (record.result.get(phase) for phase in phases)
    rows = before_after_table(*(side if isinstance(side, Mapping) else {} for side in (before, after)))
    stages = _stages(record.folder / STAGES)
    leaves = _with_stages(flatten(record.config), stages)
    return Run(
        record,
        leaves,
        seed=int(to_number(leaves.get("run.seed")) or 0),
        phase="after" if trained else "evaluation",
        before={row.metric: row.before for row in rows if row.before is not None} if trained else {},
        scores={row.metric: v for row in rows if (v := row.after if trained else row.before) is not None},
        upstream_seconds=_upstream_seconds(stages),
    )


def _stages(file: Path) -> list[dict[str, Any]]:
    """What the run's stages.json tells of the stages it is built on, [] where it tells nothing."""
    try:
        stages = json.loads(file.read_text(encoding="utf-8"))
        return [stage for stage in stages if {"stage", "address"} <= stage.keys()]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _upstream_seconds(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """What the stages took when they were made, here or for an earlier run; None where that is not known of all."""
    seconds = [to_number(stage.get("made_in_seconds")) for stage in stages]
    known = [value for value in seconds if value is not None]
    return sum(known) if known and len(known) == len(seconds) else None


def _with_stages(leaves: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The leaves with "stage:NAME" where a stage's folder stands, whose name holds its seed, and with its settings."""
    names = {str(stage["address"]): f"stage:{stage['stage']}" for stage in stages}
    told = dict(leaves)
    for key, value in leaves.items():
        made = [names[part] for part in Path(value).parts if part in names] if isinstance(value, str) else []
        told[key] = made[0] if made else value
    for stage in stages:
        told |= flatten(stage.get("settings", {}), f"stages.{stage['stage']}.")
    return told


def _kept_leaves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's config without what does not make a setting."""
    seeded = {key for run in runs for key in run.leaves if key.endswith(".seed")}
    seeded = {key for key in seeded if all(run.leaves.get(key, run.seed) == run.seed for run in runs)}
    kept = []
    for run in runs:
        made = {f"model.{role}.path" for role in ("student", "teacher") if f"model.{role}.recipe.seed" in run.leaves}
        aside = _WITHOUT_EFFECT | seeded | made
        leaves = {key: v for key, v in run.leaves.items() if not _is_aside(key, aside)}
        if run.method == EVALUATION:
            leaves = {key: value for key, value in leaves.items() if key.startswith(_EVALUATED)}
        kept.append(leaves)
    return kept


def _is_aside(key: str, aside: set[str]) -> bool:
    own = _OF_STAGE.sub("", key)
    return key in aside or own in aside or own.startswith(_ASIDE)


def _differing(many: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for leaves in many for key in leaves)
    return [key for key in keys if any(leaves.get(key) != many[0].get(key) for leaves in many)]


def _labelled(settings: Sequence[Setting]) -> list[Setting]:
    """Sorted and labelled by method and the keys in which settings of that method differ.

    Where that is long, what more than half of them have is left out of the label; then all but one key that tells them
    apart; and where there is none they are numbered.
    """
    ordered = []
    for method in dict.fromkeys(setting.method for setting in settings):
        same = [setting for setting in settings if setting.method == method]
        keys = differing_keys(same)
        if method == EVALUATION and any("model.student.path" in setting.keys for setting in same):
            keys = list(dict.fromkeys(["model.student.path", *keys]))  # the one thing it is about
        names = _short(keys)
        same.sort(key=lambda setting: [_order(setting.keys.get(key)) for key in keys])
        ordered += same
        shown = [{names[key]: show(setting.keys.get(key)) for key in keys} for setting in same]
        rare = [{name: text for name, text in mine.items() if not _is_usual(name, text, shown)} for mine in shown]
        for told in (shown, rare, *([{name: mine[name]} for mine in shown] for name in _by_method(names))):
            labels = [" ".join([method, *(f"{name}={text}" for name, text in mine.items())]) for mine in told]
            if max(map(len, labels)) <= _LONGEST_LABEL and len(set(labels)) == len(labels):
                break
        else:
            labels = [f"{method} #{number}" for number in range(1, len(same) + 1)]
        for setting, label in zip(same, labels, strict=True):
            setting.label = label
    return ordered


def _by_method(names: Mapping[str, str]) -> list[str]:
    """What labels call the keys, the method's first."""
    return [names[key] for key in sorted(names, key=lambda key: not key.startswith("method."))]


def _is_usual(name: str, text: str, shown: Sequence[Mapping[str, str]]) -> bool:
    return 2 * sum(other[name] == text for other in shown) > len(shown)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, show(value))


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted keys, as many as tell them apart."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        names[key] = next(t for t in tails if t == key or sum(f".{other}".endswith(f".{t}") for other in keys) == 1)
    return names
