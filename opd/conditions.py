"""Whether a config can run, answered before torch is imported: the schema, and what the method needs of the rest.

Whatever can only be known from a tokenizer or from the rows is refused later, but still before any weight is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd.adapter_folder import adapter_settings
from opd.config import Config, Data, Model, Student, did_you_mean, parse
from opd.data.origins import is_hub_id
from opd.data.walk_rules import evaluation_pairs, training_pairs
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
    sections = (_mode, _models, loading_problems, _data, _method, _teachers, hardware_problems, _batches)
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
        if path is not None and (Path(path) / "scores.json").is_file()
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
    path = Path(model.path or "").expanduser()
    if model.revision is None or not (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return []
    return [f"{key}.revision={model.revision}: {key}.path={model.path} is a folder and has none; set it to null"]


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
    if data.name == "file" and Path(data.path or "").expanduser().is_file():
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
    setting, place = f"{key}={path}", Path(path or "").expanduser()
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
            f"{setting}: a .txt file holds prompts only, and {_which(config)} learns from completions; "
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
    kept = any("." in need.model and _holds_scores(config.at(need.model)) for need in needs.teachers.values())
    if needs.rows is not None:
        problems.append(f"{setting}: {method} learns from its first {needs.rows} rows; set it to false")
    if needs.stored_responses or kept or any(need.precompute for need in needs.teachers.values()):
        problems.append(f"{setting}: {method} looks up what was kept of each row; set it to false")
    return problems


_OR_SET = {"file": "", "hub": ", a data set folder or a hub id", "mixture": ", a data set folder or a hub id"}


def _holds_scores(path: str | None) -> bool:
    return path is not None and (Path(path) / "scores.json").is_file()


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
