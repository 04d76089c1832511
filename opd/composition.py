"""What Hydra composed: a run's plain config, and what is wrong with the words of the command, in one line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import slurm
from opd.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_HERE = Path(__file__).resolve().parent
CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if (path / "config.yaml").is_file())


def plain(composed: DictConfig, *, submitted: bool = False) -> dict[str, Any]:
    """The config without Hydra in it, every ${…} resolved; HydraConfig holds Hydra's part of it.

    A job of a sweep writes to its folder in the sweep's, unless the command names run.dir. `submitted`: it runs in
    another job than this process, if this one belongs to any. Raises ConfigError.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        context = HydraConfig.get()
        if context.mode == RunMode.RUN and not submitted and (step := slurm.step_name()):
            composed = composed.copy()
            OmegaConf.update(composed, "run.dir", lasting(composed, step))
        raw: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        if context.mode == RunMode.MULTIRUN and not any(o.startswith("run.dir=") for o in context.overrides.task):
            raw["run"]["dir"] = context.runtime.output_dir
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    return raw


def lasting(composed: DictConfig, step: str) -> str:
    """run.dir with the step's name for the time: a job that is requeued would look for its checkpoint elsewhere.

    Several commands of one step differ by the digest of what they run. Other ${…} stay as they are.
    """
    from omegaconf import OmegaConf

    unresolved: Any = OmegaConf.to_container(composed, resolve=False)  # resolved, another ${now:…} may stand in it
    folder = unresolved["run"].pop("dir")
    digest = hashlib.sha256(json.dumps(unresolved, sort_keys=True, default=str).encode()).hexdigest()
    return re.sub(r"\$\{now:[^}]*\}", f"{step}-{digest[:6]}", folder)


def explain(error: Exception) -> str:
    """One line for what Hydra says in several: the key, and the nearest one that exists."""
    text = str(error)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{group}={option}: no such option; {_near(option, options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))
        key, known = inner[1] if inner else match[1], _known_keys()
        if key.startswith("hydra.launcher."):
            own = [f"hydra.launcher.{name}" for name in _launcher_keys()]
            return f"{key}: unknown key; {_near(key, own)}"
        if key.startswith("data.sources."):
            return f"{key}: no such source yet; put a + before the override, which adds it: +{key}…"
        remedy = f"{_listed(known[key])} has it" if known.get(key) else _near(key, sorted(known))
        return f"{key}: unknown key; {remedy}"
    if match := re.match(r"Error merging override \+*(\S+)", text):
        return f"{match[1]}: not the kind of value that stands there; `--cfg job` shows how this key is written"
    if "Missing mandatory value" in text:
        key = getattr(error, "full_key", None) or "a key"
        return f"{key}: missing; set {key}=…"
    if type(error).__name__.startswith("Interpolation"):
        return f"{getattr(error, 'full_key', '')}: {text.splitlines()[0]}; mend what stands in ${{…}}"
    if override := getattr(error, "override", None):
        return f"{override}: not an override; write key=value, and quote what holds special characters"
    return re.sub(r"\s+", " ", text).strip()


def _near(word: str, candidates: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(candidates)}" if len(candidates) < 60 else "python -m opd --help lists them"


def _launcher_keys() -> list[str]:
    """What hydra/launcher=slurm has; the others have nothing of their own."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.load(CONF / "hydra" / "launcher" / "slurm.yaml")
    return [str(key) for key in loaded if key not in ("_target_", "mode")]


def _listed(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{options[0]} (or {', '.join(options[1:3])})"


def _known_keys() -> dict[str, list[str]]:
    """Every key that some config has, dotted, with the options ("group=option") that bring it; and every group."""
    from omegaconf import DictConfig, OmegaConf

    keys: dict[str, list[str]] = {}

    def visit(node: DictConfig, prefix: str, option: str) -> None:
        for key in node:
            keys.setdefault(f"{prefix}{key}", []).append(option)
            if isinstance(child := node._get_node(key), DictConfig):
                visit(child, f"{prefix}{key}.", option)

    for path in sorted(CONF.rglob("*.yaml")):
        group = str(path.parent.relative_to(CONF))
        keys.setdefault(group, [])
        if group in ("experiment", "tuned"):
            continue  # they set keys that others bring
        loaded = OmegaConf.load(path)
        header = re.search(r"@package (\S+)", path.read_text(encoding="utf-8"))
        package = header[1] if header else group.replace("/", ".")
        if isinstance(loaded, DictConfig):
            visit(loaded, "" if package in ("_global_", ".") else f"{package}.", f"{group}={path.stem}")
    return {key: options for key, options in keys.items() if not key.startswith(("defaults", "hydra", "."))}
