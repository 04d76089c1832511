"""Whether a config can run, answered before torch is imported: the schema, and what the method needs of the rest.

Whatever can only be known from a tokenizer or from the rows is refused later, but still before any weight is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.config import Config, Model, Student, did_you_mean, parse
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
    sections = (_mode, _models, _data, _method, _teachers, _batches)
    problems = [problem for section in sections for problem in section(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _mode(config: Config) -> list[str]:
    if config.mode == "plan":
        return ["mode=plan: not built yet; use train, check, eval, responses or scores"]
    return _scores(config) if config.mode == "scores" else []


def _scores(config: Config) -> list[str]:
    """Whether there is a model that can be asked for the k likeliest ids."""
    needs, top_k = METHODS[config.method.name](config.method).needs, getattr(config.method, "top_k", None)
    asked = [need.model for need in needs.teachers.values() if need.model == "teacher" or "." in need.model]
    if top_k is None or not asked:
        return [
            f"mode=scores method={config.method.name} method.top_k={top_k}: keeps the teachers' likeliest ids; "
            "choose dckd or adpa with method.top_k=50 and its teachers' folders"
        ]
    folders = {key: config.at(key) for key in asked if "." in key}
    return [
        f"{key}={path}: holds kept scores, and mode=scores asks a model; set it to the model's folder"
        for key, path in folders.items()
        if path is not None and (Path(path) / "scores.json").is_file()
    ]


def _models(config: Config) -> list[str]:
    models = {"model.student": config.model.student, "model.teacher": config.model.teacher}
    problems = [line for key, model in models.items() for line in (*_path(key, model), *_recipe(key, model))]
    if config.model.student.path is None and config.model.student.recipe is None:
        problems.append("model.student.path=None: the student needs a folder or hub id; or model/student=walk")
    return problems + _adapter(config.model.student)


def _adapter(student: Student) -> list[str]:
    """An adapter that lies in the student's folder is trained on as it is: other settings would not be heeded."""
    file = Path(student.path or "") / "adapter_config.json"
    if student.lora is None or not student.path or not file.is_file():
        return []
    there = json.loads(file.read_text(encoding="utf-8"))
    asked = {"r": student.lora.r, "lora_alpha": student.lora.alpha, "lora_dropout": student.lora.dropout}
    return [
        f"model.student.lora.{name.removeprefix('lora_')}={value}: training continues the adapter in "
        f"model.student.path={student.path}, which has {there.get(name)}; set model.student.lora to null"
        for name, value in asked.items()
        if there.get(name) != value
    ]


def _recipe(key: str, model: Model) -> list[str]:
    if model.path is not None or model.recipe is None or model.recipe.hidden_size % (2 * model.recipe.num_heads) == 0:
        return []
    size, heads = model.recipe.hidden_size, model.recipe.num_heads
    return [
        f"{key}.recipe.hidden_size={size}: not a multiple of twice {key}.recipe.num_heads={heads}; "
        f"choose a multiple of {2 * heads}"
    ]


def _path(key: str, model: Model, suffix: str = ".path") -> list[str]:
    setting = f"{key}{suffix}={model.path}"
    if model.path is None:
        return []
    path = Path(model.path).expanduser()
    looks_local = path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.exists()
    if not looks_local:
        return []  # a hub id
    if not path.is_dir():
        return [f"{setting}: no such folder; give a model folder or a hub id"]
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        return [f"{setting}: not a model folder (no config.json); give one that save_pretrained wrote"]
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
    if config.rollout.group_size > 1 and not needs.rollouts:
        problems.append(
            f"rollout.group_size={config.rollout.group_size}: {_which(config)} samples nothing; set it to 1"
        )
    if needs.stored_responses and config.mode != "responses" and config.data.responses is None:
        problems.append(
            f"data.responses=None: method={config.method.name} reads the student's stored answers; set it to the "
            "folder that mode=responses wrote"
        )
    return problems


def _teachers(config: Config) -> list[str]:
    """Whether every teacher that the method asks for is there and can say what it is asked for."""
    needs = METHODS[config.method.name](config.method).needs
    problems, top_k = [], config.model.teacher.top_k
    for need in needs.asked(config.mode).values():
        if need.model == "teacher" and not config.model.teacher.exists:
            problems.append(
                f"model/teacher=none: method={config.method.name} needs a teacher; "
                "set model/teacher=path model.teacher.path=FOLDER_OR_HUB_ID"
            )
        elif "." in need.model:
            problems += _named_folder(config, need.model)
    kinds = {need.scores for need in needs.teachers.values()}
    if top_k is not None and "dense" in kinds:
        problems.append(f"model.teacher.top_k={top_k}: {_which(config)} needs the whole distribution; set it to null")
    if top_k is not None and kinds <= {"logprobs"}:
        problems.append(
            f"model.teacher.top_k={top_k}: {_which(config)} does not read the teacher's distribution; set it to null"
        )
    return list(dict.fromkeys(problems))


def _named_folder(config: Config, key: str) -> list[str]:
    path = config.at(key)
    if path is None:
        return [f"{key}=None: method={config.method.name} needs it; set it to a folder"]
    if (Path(path) / "scores.json").is_file():
        return []
    if key == "method.scores" and Path(path).expanduser().exists():
        return [f"{key}={path}: holds no kept scores (no scores.json); make them with mode=scores, or set it to null"]
    return _path(key, config.model.teacher.model_copy(update={"path": path}), suffix="")


def _which(config: Config) -> str:
    """The method with the settings that its needs depend on."""
    told = [
        f"method.{k}={v}" for k, v in config.method.model_dump().items() if k in ("lmbda", "seq_kd", "kd_temperature")
    ]
    return " ".join([f"method={config.method.name}", *told])


def _batches(config: Config) -> list[str]:
    ranks, together = config.hardware.world_size, len(METHODS[config.method.name](config.method).needs.sequences)
    problems = []
    if config.trains and config.train.batch_size % ranks:
        problems.append(
            f"train.batch_size={config.train.batch_size}: not a multiple of the {ranks} processes of "
            f"hardware={config.hardware.name}; choose one that is"
        )
    if config.train.micro_batch_size % together:
        problems.append(
            f"train.micro_batch_size={config.train.micro_batch_size}: method={config.method.name} keeps the {together} "
            f"sequences of a row together; choose a multiple of {together}"
        )
    return problems
