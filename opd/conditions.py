"""Whether a config can run, answered before torch is imported: the schema, and what the method needs of the rest.

Whatever can only be known from a tokenizer or from the rows is refused later, but still before any weight is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd.config import Config, Model, did_you_mean, parse
from opd.data.walk_rules import evaluation_pairs, training_pairs
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.protocols import Needs


def validated(raw: dict[str, Any]) -> Config:
    """The config, typed and checked. Raises ConfigError, one line a problem."""
    name = (raw.get("method") or {}).get("name")
    if name not in METHODS:
        raise ConfigError(f"method.name={name!r}: unknown method; {did_you_mean(str(name), list(METHODS))}")
    config = parse(raw, METHODS[name].Config)
    problems = [*_mode(config), *_models(config), *_data(config), *_method(config), *_batches(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _mode(config: Config) -> list[str]:
    if config.mode in ("check", "plan"):
        return [f"mode={config.mode}: not built yet; use mode=train or mode=eval"]
    return []


def _models(config: Config) -> list[str]:
    models = {"model.student": config.model.student, "model.teacher": config.model.teacher}
    problems = [line for key, model in models.items() for line in (*_path(key, model), *_recipe(key, model))]
    if config.model.student.path is None and config.model.student.recipe is None:
        problems.append("model.student.path=None: the student needs a folder or hub id; or model/student=walk")
    return problems


def _recipe(key: str, model: Model) -> list[str]:
    if model.path is not None or model.recipe is None or model.recipe.hidden_size % (2 * model.recipe.num_heads) == 0:
        return []
    size, heads = model.recipe.hidden_size, model.recipe.num_heads
    return [
        f"{key}.recipe.hidden_size={size}: not a multiple of twice {key}.recipe.num_heads={heads}; "
        f"choose a multiple of {2 * heads}"
    ]


def _path(key: str, model: Model) -> list[str]:
    if model.path is None:
        return []
    path = Path(model.path).expanduser()
    looks_local = path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.exists()
    if not looks_local:
        return []  # a hub id
    if not path.is_dir():
        return [f"{key}.path={model.path}: no such folder; give a model folder or a hub id"]
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        return [f"{key}.path={model.path}: not a model folder (no config.json); give one that save_pretrained wrote"]
    return []


def _data(config: Config) -> list[str]:
    data = config.data
    if data.name == "walk":
        limits = {"limit": len(training_pairs()), "eval_prompts": len(evaluation_pairs())}
        asked = {key: getattr(data, key) or 0 for key in limits}
        return [
            f"data.{key}={asked[key]}: the walk has {most} such prompts; lower it to {most} or less"
            for key, most in limits.items()
            if asked[key] > most
        ]
    if data.path is None:
        return ["data.path=None: data=file reads a file; set data.path"]
    if Path(data.path).is_dir():
        return [f"data.path={data.path}: is a folder; name one file in it"]
    if not Path(data.path).is_file():
        return [
            f"data.path={data.path}: no such file (looked from {Path.cwd()}); give a .json .jsonl .csv .parquet .txt"
        ]
    needs = METHODS[config.method.name](config.method).needs
    if data.path.endswith(".txt") and needs.completions == "required":
        return [
            f"data.path={data.path}: a .txt file holds prompts only, and {_which(config)} learns from completions; "
            "give .jsonl rows with `messages`, or choose an on-policy method"
        ]
    return []


def _method(config: Config) -> list[str]:
    needs: Needs = METHODS[config.method.name](config.method).needs
    problems = []
    if needs.teachers and not config.model.teacher.exists:
        problems.append(
            f"model/teacher=none: method={config.method.name} needs a teacher; "
            "set model/teacher=path model.teacher.path=FOLDER_OR_HUB_ID"
        )
    if config.model.teacher.top_k is not None and "dense" in needs.teachers.values():
        problems.append(
            f"model.teacher.top_k={config.model.teacher.top_k}: {_which(config)} needs the teacher's whole "
            "distribution; set it to null"
        )
    if config.model.teacher.top_k is not None and set(needs.teachers.values()) <= {"logprobs"}:
        problems.append(
            f"model.teacher.top_k={config.model.teacher.top_k}: {_which(config)} does not read the teacher's "
            "distribution; set it to null"
        )
    if config.rollout.group_size > 1 and not needs.rollouts:
        problems.append(
            f"rollout.group_size={config.rollout.group_size}: {_which(config)} samples nothing; set it to 1"
        )
    return problems


def _which(config: Config) -> str:
    """The method with the settings that its needs depend on."""
    told = [
        f"method.{k}={v}" for k, v in config.method.model_dump().items() if k in ("lmbda", "seq_kd", "kd_temperature")
    ]
    return " ".join([f"method={config.method.name}", *told])


def _batches(config: Config) -> list[str]:
    ranks = config.hardware.world_size
    if config.train.batch_size % ranks:
        return [
            f"train.batch_size={config.train.batch_size}: not a multiple of the {ranks} processes of "
            f"hardware={config.hardware.name}; choose one that is"
        ]
    return []
