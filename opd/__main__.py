"""The front door: compose (Hydra) -> validate -> launch. No torch here: --help, --cfg and bad input answer at once."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, OpdError

_HERE = Path(__file__).resolve().parent
CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if (path / "config.yaml").is_file())

USAGE = """opd distils language models: any method, any hardware, one command.

  python -m opd                                  the embedded task on this CPU: trains, reports
  python -m opd method=reverse_kl                another method
  python -m opd data=file data.path=rows.jsonl model/student=path model.student.path=FOLDER_OR_HUB_ID \\
                model/teacher=path model.teacher.path=FOLDER_OR_HUB_ID
  python -m opd -m method.beta=0,0.5,1           a sweep
  python -m opd --cfg job                        everything a run would use; nothing runs
  python -m opd --hydra-help                     Hydra's own flags
"""


def main() -> None:
    """`opd` and `python -m opd`. Exit 0; 1 where the run failed; 2 where config or data cannot run; 130 on Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions over instead of printing them
    try:
        _compose_and_run()
    except OpdError as error:
        sys.exit(_say(error))
    except KeyboardInterrupt:
        print("interrupted; the same command with the same run.dir continues", file=sys.stderr)
        sys.exit(130)


def _say(error: OpdError) -> int:
    for line in str(error).splitlines():
        print(f"opd: {line}", file=sys.stderr)
    return error.exit_code


def _compose_and_run() -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_task)
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(_help([word for word in sys.argv[1:] if not word.startswith("-")]))
        else:
            entry()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None


def _help(overrides: list[str]) -> str:
    """Usage, groups, and the config that these overrides make. Hydra's own help takes twice as long."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=overrides)
    groups: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/**/*.yaml")):
        groups.setdefault(str(path.parent.relative_to(CONF)), []).append(path.stem)
    listed = "\n".join(f"  {group:14}  {', '.join(options)}" for group, options in groups.items())
    return f"{USAGE}\nGroups (group=option)\n{listed}\n\nEvery key (key=value)\n{OmegaConf.to_yaml(config)}"


def _task(composed: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from opd.stages import run

    try:
        raw: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        context = HydraConfig.get()
        if context.mode == RunMode.MULTIRUN and not any(o.startswith("run.dir=") for o in context.overrides.task):
            raw["run"]["dir"] = context.runtime.output_dir
        run(raw)
    except OpdError as error:  # Hydra would print a line of its own above ours
        sys.exit(_say(error))
    except OmegaConfBaseException as error:
        sys.exit(_say(ConfigError(_explain(error))))


def _explain(error: Exception) -> str:
    """One line for what Hydra says in several: the key, and the nearest one that exists."""
    text = str(error)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{group}={option}: no such option; {_near(option, options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))
        key, known = inner[1] if inner else match[1], _known_keys()
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


if __name__ == "__main__":
    main()
