"""A run as a graph of stages: what it needs and is not there yet is made first, kept by content, and never made twice.

A config names a stage by "stage:NAME" wherever a folder may stand. `stages.NAME` says how that stage differs from the
run itself, so it is a whole run too: its folder lies in artifacts.dir, under the digest of everything that decides what
it becomes (opd.lineage). A key that changes therefore makes again what lies downstream of it and nothing else, and a
stage that was killed continues, whoever asks for it next.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from opd.artifacts.run_folder import STAGES, RunFolder
from opd.artifacts.store import Store
from opd.conditions import validated
from opd.config import Config, parse
from opd.devices import with_device
from opd.errors import ConfigError, OpdError
from opd.launch import launch
from opd.methods import METHODS
from opd.stage_graph import Stage, begun, kind_of, merge, needed, of_stage, plan, resolved

log = logging.getLogger("opd")


def run(raw: dict[str, Any]) -> None:
    """Make the stages that the run refers to, then the run. All configs are checked before the first stage begins."""
    raw, final, stages = _planned(with_device(raw))
    store = Store(Path(final.artifacts.dir))
    if not stages:
        launch(final)
        return
    if final.mode == "check":
        _check(raw, stages)
        return
    config = begun(resolved(raw, stages))
    told: list[dict[str, Any]] = []
    _tell(final, told)
    _start_console()
    needless = _needless(raw, stages)
    for number, (name, stage) in enumerate(stages.items(), 1):
        title = f"stage {number}/{len(stages)} {name} ({stage.kind})"
        if name in needless and not stage.place.is_dir():
            log.info("%s: %s is not there, and not needed", title, stage.place.name)
            told.append(_record(stage, None))
        else:
            told.append(_make(stage, stages, store, title))
        _tell(final, told)
    log.info("\n%s\n", _summary(told, kind_of(raw)))
    launch(validated(config))


def check(raw: dict[str, Any]) -> Config:
    """The run's config, where all that can be refused before anything is made was found good.

    Checked are the configs of the run and of its stages, how they refer to each other, and run.dir; nothing is written.
    Raises FinishedError where run.dir holds this run, finished; else ConfigError, one line a problem.
    """
    return _planned(raw)[1]


def _planned(raw: dict[str, Any]) -> tuple[dict[str, Any], Config, dict[str, Stage]]:
    """The config apart from its definitions of stages, the same typed, and the stages that it needs."""
    raw = copy.deepcopy(raw)
    definitions = raw.pop("stages", None) or {}
    final = validated(begun(raw))
    stages = plan(raw, definitions, Store(Path(final.artifacts.dir)))
    if final.mode != "check":
        # The folders in it need not exist yet, but a run.dir of another or of a finished run is refused now.
        RunFolder(parse(begun(resolved(raw, stages)), METHODS[final.method.name].Config))
    return raw, final, stages


def _check(raw: dict[str, Any], stages: dict[str, Stage]) -> None:
    """mode=check of a graph: every training in it that has all it reads. Nothing is made."""
    _start_console()
    refused, unseen = [], []
    trainings = {name: stage.raw for name, stage in stages.items() if stage.raw["mode"] == "train"} | {"": raw}
    for name, own in trainings.items():
        title = f"stages.{name}" if name else "the run itself"
        missing = sorted({inner for _, inner in needed(own) if not stages[inner].place.is_dir()})
        if name and stages[name].place.is_dir():
            log.info("\n%s: made already", title)
        elif missing:
            log.info("\n%s: reads %s, not made yet; it is checked when it begins", title, ", ".join(missing))
            unseen.append(title)
        else:
            log.info("\n%s", title)
            try:
                launch(validated(begun(resolved({**own, "mode": "check"}, stages))))
            except OpdError as error:
                refused.append(of_stage(name, error) if name else error)
    if refused:
        raise type(refused[0])("\n".join(str(error) for error in refused))
    if unseen:
        log.info("\nnot checked yet: %s", ", ".join(unseen))


def _needless(raw: dict[str, Any], stages: dict[str, Stage]) -> set[str]:
    """The stages that nothing reads which has yet to be made: a removed one among them is not missed."""
    wanted = {name for _, name in needed(raw)}
    for name, stage in reversed(stages.items()):
        if name in wanted and not stage.place.is_dir():
            wanted |= {inner for _, inner in needed(stage.raw)}
    return stages.keys() - wanted


def _make(stage: Stage, stages: dict[str, Stage], store: Store, title: str) -> dict[str, Any]:
    """Make the stage's artefact, or find it; what stages.json tells of it."""
    is_there, started, made_here = store.find(stage.kind, stage.recipe) is not None, time.perf_counter(), False
    log.info("%s: %s is there" if is_there else "\n%s: %s begins", title, stage.place.name)

    def make(folder: Path) -> None:
        nonlocal made_here
        made_here = True
        raw = begun(resolved(stage.raw, stages))
        raw["run"]["dir"] = str(folder)
        if "seconds" not in _result(folder):
            _run_stage(stage.name, validated(raw))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    store.get_or_make(stage.kind, stage.recipe, make, inputs=stage.inputs, resumable=True)
    seconds = time.perf_counter() - started
    if not is_there:
        log.info("%s: %s in %.0f s", title, stage.place if made_here else "made by another process", seconds)
    return _record(stage, seconds if made_here else None)


def _record(stage: Stage, seconds: float | None) -> dict[str, Any]:
    """What stages.json tells of the stage; `seconds`: what making it took this command, None where it did not."""
    result = _result(stage.place)
    return {
        "stage": stage.name,
        "address": stage.place.name,
        "reused": seconds is None,
        "seconds": seconds or 0.0,
        # Of a training over all its sessions, without evaluations, as in its result.json.
        "made_in_seconds": result.get("train_seconds", result.get("seconds")),
        "ledger": result.get("ledger", {}),
        "settings": _settings(stage),
    }


def _settings(stage: Stage) -> dict[str, Any]:
    """How the stage differs from the run, and whose weights it starts from: the run's own config then names others."""
    told, student = copy.deepcopy(stage.settings), stage.raw["model"]["student"]
    if student.get("init") is None:
        merge(told, {"model": {"student": {key: student.get(key) for key in ("path", "revision", "recipe")}}})
    return told


def _run_stage(name: str, config: Config) -> None:
    """Run it; a failure says which stage it was."""
    file = Path(config.run.dir) / "config.yaml"
    if file.is_file():
        # What may differ from the command that began it (a cadence, say) decides nothing: the address is the same.
        file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    try:
        launch(config)
    except OpdError as error:
        raise of_stage(name, error) from error
    finally:
        _start_console()  # what comes next is not for the stage's own log
        gc.collect()  # models hang in cycles, and the next stage needs their room


def _start_console() -> None:
    from opd.artifacts.console import start_logging

    start_logging()


def _result(folder: Path) -> dict[str, Any]:
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _summary(told: list[dict[str, Any]], last: str) -> str:
    """A line for each stage, and what begins now."""
    widths = [max(len(stage[key]) for stage in told) for key in ("stage", "address")]
    lines = [
        f"  {stage['stage']:{widths[0]}}  {stage['address']:{widths[1]}}  "
        + ("reused" if stage["reused"] else f"made in {stage['seconds']:.0f} s")
        for stage in told
    ]
    return "\n".join(["stages", *lines, "", f"the run itself ({last}) begins"])


def _tell(final: Config, told: list[dict[str, Any]]) -> None:
    folder = Path(final.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STAGES).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be written ({error.strerror}); choose another folder") from None
