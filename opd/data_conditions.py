"""Whether the data section fits itself and the method, and whether what it names is there."""

from __future__ import annotations

from pathlib import Path

from opd.artifacts.folders import holds_scores
from opd.config import Config, Data
from opd.data.origins import is_hub_id
from opd.data.walk_rules import evaluation_pairs, training_pairs
from opd.methods import METHODS

_OR_SET = {"file": "", "hub": ", a data set folder or a hub id", "mixture": ", a data set folder or a hub id"}


def data_problems(config: Config) -> list[str]:
    """One line a problem: key, value, remedy."""
    data = config.data
    if data.name == "walk":
        unread = [
            key for key in ("streaming", "sources", "eval_path", "eval_split", "system_prompt") if getattr(data, key)
        ]
        if unread:
            return [f"data.{key}={getattr(data, key)}: data=walk makes its rows; leave it out" for key in unread]
        limits = {"limit": len(training_pairs()), "eval_prompts": len(evaluation_pairs())}
        asked = {key: getattr(data, key) or 0 for key in limits}
        return [
            f"data.{key}={asked[key]}: the walk has {most} such prompts; lower it to {most} or less"
            for key, most in limits.items()
            if asked[key] > most
        ]
    where = {f"{key}.path": origin.path for key, origin in data.origins.items()}
    if not where:
        return ["data.sources={}: a mixture of nothing; name its parts, +data.sources.NAME.path=… .weight=…"]
    problems = [line for key, path in where.items() for line in _rows(config, key, path)]
    if data.eval_path is not None:
        problems += _rows(config, "data.eval_path", data.eval_path)
        if not data.eval_prompts:
            problem = f"data.eval_path={data.eval_path}: data.eval_prompts=0 evaluates on no row of it"
            problems.append(f"{problem}; raise data.eval_prompts, or set data.eval_path to null")
    if data.name == "file" and Path(data.path or "").is_file():
        problems += _one_file(data)
    if data.name != "mixture" and data.sources:
        problems.append(
            f"data.sources: data={data.name} has one source; choose data=mixture, or leave data.sources out"
        )
    if data.eval_split is not None and data.eval_path is None and data.name != "hub":
        problem = f"data.eval_split={data.eval_split}: data={data.name} has no splits"
        problems.append(f"{problem}; set data.eval_path, or set data.eval_split to null")
    return problems + (_stream(config) if data.streaming and not problems else [])


def _one_file(data: Data) -> list[str]:
    """What is set for data sets alone."""
    remedy = "data=file reads one file; leave it null, or use data=hub"
    problems = [
        f"data.{key}={value}: {remedy}"
        for key, value in (("subset", data.subset), ("revision", data.revision))
        if value is not None
    ]
    # A data set in eval_path is read at this split, unless eval_split names another.
    if data.split != "train" and data.eval_path is None:
        problems.append(f"data.split={data.split}: {remedy.replace('null', 'train')}")
    return problems


def _rows(config: Config, key: str, path: str | None) -> list[str]:
    """Whether there is such a file or folder; a hub id is looked up later."""
    setting, place = f"{key}={path}", Path(path or "")
    needs = METHODS[config.method.name](config.method).needs
    if path is None:
        return [f"{setting}: data={config.data.name} reads rows; set {key} to a file" + _OR_SET[config.data.name]]
    if config.data.name == "file" and key == "data.path" and place.is_dir():
        return [f"{setting}: is a folder; name one file in it, or read it as a data set (data=hub)"]
    if not place.exists() and (config.data.name == "file" or not is_hub_id(path)):
        kinds = "give a .json .jsonl .csv .parquet .txt" + _OR_SET[config.data.name]
        return [f"{setting}: no such file (looked from {Path.cwd()}); {kinds}"]
    if path.endswith(".txt") and (needs.completions == "required" or needs.pairs) and key != "data.eval_path":
        return [
            f"{setting}: a .txt file holds prompts only, and {config.method_words} learns from completions; "
            "give .jsonl rows with `messages`, or choose an on-policy method"
        ]
    return []


def _stream(config: Config) -> list[str]:
    """Whether the run can do with rows that it sees one after the other."""
    needs, data = METHODS[config.method.name](config.method).needs, config.data
    setting, method = "data.streaming=true", f"method={config.method.name}"
    problems = []
    if data.name == "mixture":
        problems.append(f"{setting}: data=mixture needs to know how many rows there are; set it to false")
    if str(data.path).endswith(".json"):
        problems.append(f"{setting}: data.path={data.path} can only be read whole; write it as .jsonl")
    if config.train.max_steps is None:
        problems.append(f"train.max_steps=None: {setting} knows no end of the data; set train.max_steps")
    if config.train.save_every_epoch:
        problems.append(f"train.save_every_epoch=true: {setting} knows no passes; set train.save_every_steps instead")
    if config.mode in ("responses", "scores"):
        problems.append(f"{setting}: mode={config.mode} goes over all rows; set it to false, and data.limit if need be")
    kept = any("." in need.model and holds_scores(config.at(need.model)) for need in needs.teachers.values())
    if needs.rows is not None:
        problems.append(f"{setting}: {method} learns from its first {needs.rows} rows; set it to false")
    if needs.stored_responses or kept or any(need.precompute for need in needs.teachers.values()):
        problems.append(f"{setting}: {method} looks up what was kept of each row; set it to false")
    return problems
