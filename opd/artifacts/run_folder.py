"""The folder of a run: what it holds, whose it is, and whether it may be written to."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from opd.artifacts.folders import make_folder
from opd.config import Config
from opd.errors import ConfigError, FinishedError, RunError

log = logging.getLogger("opd")

# Keys that may differ between an interrupted run and the command that continues it; so may the path of a model that
# a recipe made.
_FREE = {("run", "resume"), ("run", "dir"), ("run", "preflight"), ("tracking",), ("artifacts",)}


RANK_LOGS = ".ranks"  # where the launcher keeps what each rank printed; it is there before the run is
SLURM = ".slurm"  # what was submitted to Slurm for it, with the logs
STAGES = "stages.json"  # the stages that were made for the run, which may be before it begins
_LOCK = ".lock"  # held by the process that writes
SPENT = "spent.json"  # in a checkpoint: seconds and tokens up to it, and which ranks it belongs to
_BEFORE = (RANK_LOGS, SLURM, STAGES, _LOCK, ".config.yaml.partial")  # what may be there before config.yaml is


def ranks_of(config: Config) -> dict[str, Any]:
    """What a checkpoint of this run belongs to: spent.json has it."""
    return {"processes": config.hardware.world_size, "sharding": config.hardware.sharding}


class RunFolder:
    """A run's folder. Opening refuses one that is finished, that belongs to another config, or that is not a run's."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.dir)
        self.checkpoint: Path | None = None
        self.continues = False
        self._config = config
        self._lock: BaseFileLock | None = None
        self._inspect()

    def _inspect(self) -> None:
        key, resume = f"run.dir={self.path}", self._config.run.resume
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{key}: is a file; choose another folder")
        if (file := next((parent for parent in self.path.parents if parent.is_file()), None)) is not None:
            raise ConfigError(f"{key}: lies in a file ({file}); choose another folder")
        if resume not in ("auto", "never"):
            self.checkpoint = Path(resume)
            if not (self.checkpoint / "trainer_state.json").is_file():
                raise ConfigError(f"run.resume={resume}: not a checkpoint folder (auto, never, or a checkpoint-N)")
            self._refuse_other_ranks(self.checkpoint)
        if not self.path.exists() or all(e.name in _BEFORE for e in self.path.iterdir()):
            return
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"{key}: not empty, and not a run's folder (no config.yaml); choose another folder")
        if resume == "never":
            raise ConfigError(f"{key}: holds a run, and run.resume=never; choose another folder, or run.resume=auto")
        theirs = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        differing = _differences(theirs, self._config.model_dump(mode="json"))
        if differing:
            remedy = "choose another folder"
            if re.search(r"hardware\.(nodes|processes_per_node|sharding)", differing):
                remedy += "; checkpoints belong to the number of processes and the sharding that saved them"
            raise ConfigError(f"{key}: holds a run of another config ({differing}); {remedy}")
        if self.finished:
            raise FinishedError(
                f"{key}: holds a finished run; choose another run.dir (its report: {self.path / 'report.html'})"
            )
        self.continues = True
        if self.checkpoint is None:
            self.checkpoint = max(self.path.glob("checkpoint-*"), key=_step, default=None)

    def _refuse_other_ranks(self, checkpoint: Path) -> None:
        file, mine = checkpoint / SPENT, ranks_of(self._config)
        theirs = {**mine, **(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})}
        if any(theirs[name] != value for name, value in mine.items()):
            raise ConfigError(
                f"run.resume={checkpoint}: was saved by {theirs['processes']} processes with hardware.sharding="
                f"{theirs['sharding']}, and this run has {mine['processes']} with {mine['sharding']}; a checkpoint "
                "belongs to the number of processes and the sharding that saved it: continue with those"
            )

    @property
    def finished(self) -> bool:
        """Whether the run that lies here came to its end."""
        return "seconds" in self.read_result()

    @property
    def resumed_step(self) -> int:
        """Optimizer steps that are already done."""
        return 0 if self.checkpoint is None else _step(self.checkpoint)

    def create(self) -> None:
        """Make the folder, or take up an interrupted one: what was logged after its last checkpoint is cut off."""
        make_folder(self.path, key=f"run.dir={self.path}")
        self._lock = FileLock(self.path / _LOCK, blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run.dir={self.path}: another process is writing this run; wait for it, or choose another folder"
            ) from None
        text = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.write("config.yaml", text)
        if self.continues:
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._cut(name, self.resumed_step)
            shutil.rmtree(self.path / ".saving", ignore_errors=True)

    def release(self) -> None:
        """Let another process write here; the end of this one does the same."""
        if self._lock is not None:
            self._lock.release()
            (self.path / _LOCK).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Replace a file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path / name)
        except OSError as error:
            raise self.full(name, error) from error

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        self.write(name, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")
        except OSError as error:
            raise self.full(name, error) from error

    def read_result(self) -> dict[str, Any]:
        """result.json, {} where there is none yet."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def full(self, name: str, error: Exception) -> RunError:
        """What to tell when a file could not be written."""
        reason = getattr(error, "strerror", None) or error
        return RunError(
            f"run.dir={self.path}: {name} could not be written ({reason}); earlier checkpoints are whole: "
            "free space and run the same command again"
        )

    def _cut(self, name: str, step: int) -> None:
        file = self.path / name
        if not file.is_file():
            return
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines also splits inside a text
        kept = [line for line in lines if _logged_step(line) <= step]
        if len(kept) < len(lines):
            log.info("%s: %d lines after step %d are made again", name, len(lines) - len(kept), step)
        self.write(name, "".join(line + "\n" for line in kept))


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a kill cut short
        return math.inf


def _step(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint holds; its name may be any."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _finite(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _differences(theirs: Any, mine: Any) -> str:
    """'method.beta: 0.5 there, 1.0 here', for up to three keys."""
    made = {("model", role, "path") for role, model in mine["model"].items() if model["recipe"] is not None}
    found = [
        f"{'.'.join(key)}: {there!r} there, {here!r} here"
        for key, there, here in _walk(theirs, mine, ())
        if not any(key[: len(free)] == free for free in _FREE | made)
        and not (_kept_as(there, theirs) == _kept_as(here, mine) is not None)
    ]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _kept_as(value: Any, config: dict[str, Any]) -> Path | None:
    """Where a path lies in the config's artifacts.dir, which may be another folder elsewhere; None if not there."""
    folder = (config.get("artifacts") or {}).get("dir")
    if not isinstance(value, str) or folder is None or not Path(value).is_relative_to(folder):
        return None
    return Path(value).relative_to(folder)


def _walk(theirs: Any, mine: Any, key: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = list(dict.fromkeys([*theirs, *mine]))
        return [row for name in names for row in _walk(theirs.get(name), mine.get(name), (*key, name))]
    return [] if theirs == mine else [(key, theirs, mine)]
