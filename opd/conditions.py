"""Whether a config can run, answered before torch is imported: the schema, and what the method needs of the rest.

Whatever can only be known from a tokenizer or from the rows is refused later, but still before any weight is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd.adapter_folder import adapter_settings
from opd.artifacts.folders import holds_scores
from opd.config import Config, Model, Student, did_you_mean, parse
from opd.data_conditions import data_problems
from opd.errors import ConfigError
from opd.hardware_conditions import hardware_problems
from opd.methods import METHODS
from opd.model_conditions import loading_problems
from opd.protocols import Needs


def validated(raw: dict[str, Any]) -> Config:
    """The config, typed and checked. Raises ConfigError, one line a problem."""
    name = (raw.get("method") or {}).get("name")
    if name not in METHODS:
        raise ConfigError(f"method.name={name!r}: unknown method; {did_you_mean(str(name), list(METHODS))}")
    config = parse(raw, METHODS[name].Config)
    sections = (_mode, _models, loading_problems, data_problems, _method, _teachers, hardware_problems, _batches)
    sections += (_optimizer, _lm_tasks, _tracking)
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
        if holds_scores(path)
    ]


def _models(config: Config) -> list[str]:
    models = {"model.student": config.model.student, "model.teacher": config.model.teacher}
    problems = [
        line
        for key, model in models.items()
        for line in (*_path(key, model), *_recipe(key, model), *_revision(key, model))
    ]
    if config.model.student.path is None and config.model.student.recipe is None:
        problems.append("model.student.path=None: the student needs a folder or hub id; or model/student=walk")
    return problems + _adapter(config.model.student)


def _adapter(student: Student) -> list[str]:
    """An adapter that lies in the student's folder is trained on as it is: other settings would not be heeded."""
    if student.lora is None or not student.path:
        return []
    there = adapter_settings(student.path, "model.student.path")
    if there is None:
        return []
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


def _revision(key: str, model: Model) -> list[str]:
    """A folder is as it is; but the base of an adapter that lies in it may be a hub id."""
    path = Path(model.path or "")
    if model.revision is None or not (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return []
    return [f"{key}.revision={model.revision}: {key}.path={model.path} is a folder and has none; set it to null"]


def _path(key: str, model: Model, suffix: str = ".path") -> list[str]:
    setting = f"{key}{suffix}={model.path}"
    if model.path is None:
        return []
    path = Path(model.path)
    looks_local = path.is_absolute() or model.path.startswith(".") or model.path.count("/") > 1 or path.exists()
    if not looks_local:
        return []  # a hub id
    if not path.is_dir():
        return [f"{setting}: no such folder; give a model folder or a hub id"]
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        return [f"{setting}: not a model folder (no config.json); give one that save_pretrained wrote"]
    return []


def _method(config: Config) -> list[str]:
    needs: Needs = METHODS[config.method.name](config.method).needs
    problems = []
    if config.rollout.group_size > 1 and not needs.rollouts:
        problems.append(
            f"rollout.group_size={config.rollout.group_size}: {config.method_words} samples nothing; set it to 1"
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
    setting = f"model.teacher.top_k={top_k}: {config.method_words}"
    if top_k is not None and "dense" in kinds:
        problems.append(f"{setting} needs the whole distribution; set it to null")
    if top_k is not None and kinds <= {"logprobs"}:
        problems.append(f"{setting} does not read the teacher's distribution; set it to null")
    return list(dict.fromkeys(problems))


def _named_folder(config: Config, key: str) -> list[str]:
    path = config.at(key)
    if path is None:
        return [f"{key}=None: method={config.method.name} needs it; set it to a folder"]
    if holds_scores(path):
        return []
    if key == "method.scores" and Path(path).exists():
        return [f"{key}={path}: holds no kept scores (no scores.json); make them with mode=scores, or set it to null"]
    return _path(key, config.model.teacher.model_copy(update={"path": path}), suffix="")


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


def _optimizer(config: Config) -> list[str]:
    """What is set for another optimizer or schedule."""
    train, problems = config.train, []
    if train.optimizer != "adamw" and train.adam_betas != (default := type(train).model_fields["adam_betas"].default):
        problem = f"train.adam_betas={list(train.adam_betas)}: train.optimizer={train.optimizer} has none"
        problems.append(f"{problem}; set it to {list(default)}, or train.optimizer to adamw")
    if train.lr_scheduler != "cosine" and train.min_lr_ratio:
        problem = f"train.min_lr_ratio={train.min_lr_ratio}: train.lr_scheduler={train.lr_scheduler} has no such end"
        problems.append(f"{problem}; set it to 0, or train.lr_scheduler to cosine")
    return problems


def _lm_tasks(config: Config) -> list[str]:
    """Whether lm-eval is there, and the task files that it is given."""
    tasks = config.evaluation.lm_eval.tasks
    if not tasks or not (config.trains or config.mode == "eval"):
        return []
    if find_spec("lm_eval") is None:
        return [f"evaluation.lm_eval.tasks={tasks}: needs lm-eval, not installed here; pip install 'opd[eval]'"]
    files = [name for name in tasks if name.endswith((".yaml", ".yml"))]
    return [
        f"evaluation.lm_eval.tasks={name}: no such file (looked from {Path.cwd()}); give a task's YAML file, or a "
        "task that lm-eval knows by name"
        for name in files
        if not Path(name).is_file()
    ]


def _tracking(config: Config) -> list[str]:
    if config.tracking.backend == "tensorboard" and find_spec("tensorboard") is None:
        return ["tracking=tensorboard: needs tensorboard, not installed here; pip install 'opd[tensorboard]'"]
    return []
