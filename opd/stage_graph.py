"""Which stages a run refers to, what config each has, in which order they come, and where their results lie.

Nothing is made here. A stage's config is the run's, changed to what `stages.NAME` says; references stay in it until
the folders that they stand for are there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.artifacts.store import Store
from opd.conditions import validated
from opd.config import Config, did_you_mean, parse
from opd.errors import ConfigError, OpdError
from opd.lineage import REFERENCE, is_read, recipe, references
from opd.methods import METHODS

_MODES = ("train", "responses", "scores")
_MODEL_KEYS = (
    "path",
    "revision",
    "dtype",
    "attention",
    "trust_remote_code",
    "chat_template",
    "thinking",
    "quantization",
    "recipe",
)


@dataclass(frozen=True)
class Stage:
    """One stage: its whole config with references still in it, and where its result lies or will lie.

    `settings`: how the config differs from the run's, as `stages.NAME` has it. `inputs`: what its result is made from.
    """

    name: str
    raw: dict[str, Any]
    settings: dict[str, Any]
    recipe: dict[str, Any]
    place: Path
    inputs: list[Path]

    @property
    def result(self) -> Path:
        """What a reference to the stage stands for: a model's folder, or that of answers or scores."""
        return self.place / "final_model" if self.raw["mode"] == "train" else self.place

    @property
    def kind(self) -> str:
        """What its artefact is called."""
        return kind_of(self.raw)


def plan(raw: dict[str, Any], definitions: dict[str, Any], store: Store) -> dict[str, Stage]:
    """The stages that the run refers to, each after those it needs itself, with their addresses. Nothing is made."""
    stages: dict[str, Stage] = {}
    for name, config in _in_order(raw, definitions).items():
        places = {made.name: made.place for made in stages.values()}
        found, inputs = recipe(name, begun(config), _parsed(config), store, places)
        stages[name] = Stage(name, config, definitions[name], found, store.address(kind_of(config), found), inputs)
    return stages


def _in_order(raw: dict[str, Any], definitions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of the stages that the run needs, each after those it needs itself."""
    order: dict[str, dict[str, Any]] = {}

    def visit(key: str, name: str, above: tuple[str, ...]) -> None:
        setting = f"{key}={REFERENCE}{name}"
        if name in above:
            raise ConfigError(f"{setting}: the stage needs itself; name a folder instead")
        if name not in definitions:
            remedy = did_you_mean(name, list(definitions)) if definitions else "name a folder instead"
            raise ConfigError(f"{setting}: no such stage; {remedy}")
        if name not in order:
            config = _stage_config(raw, definitions[name], name)
            _check(name, config)
            for inner_key, inner in needed(config):
                visit(f"stages.{name}.{inner_key}", inner, (*above, name))
            order[name] = config
        mode, wanted = order[name]["mode"], _wanted(key)
        if mode not in wanted:
            raise ConfigError(f"{setting}: stages.{name}.mode is {mode}; name a stage of mode {' or '.join(wanted)}")

    for key, name in needed(raw):
        if raw["mode"] == "scores" and key == "method.scores":
            raise ConfigError(f"{key}={REFERENCE}{name}: mode=scores makes them itself; set method.scores=null")
        visit(key, name, ())
    return order


def _wanted(key: str) -> tuple[str, ...]:
    """The modes of stages that may stand at this key."""
    if key.endswith("data.responses"):
        return ("responses",)
    if key.endswith("method.scores"):
        return ("scores",)
    return ("train",) if "model." in key else ("train", "scores")


def needed(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, name of the stage) of every reference that is read."""
    config, initial = _parsed(raw), raw["model"]["student"].get("init")
    unread = {"model.student.path"} if initial is not None else set()
    return [(key, name) for key, name in references(raw) if key not in unread and is_read(config, key)]


def _stage_config(raw: dict[str, Any], settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The run's config, changed to what `stages.NAME` says. What the stage is there to make it does not read."""
    differs, config = copy.deepcopy(settings), copy.deepcopy(raw)
    trained = differs.pop("trains", "student")
    if trained not in ("student", "teacher"):
        raise ConfigError(
            f"stages.{name}.trains={trained!r}: must be student or teacher; it says which model is trained"
        )
    config["mode"], config["data"]["responses"] = "train", None
    config["method"] = {key: None if v == REFERENCE + name else v for key, v in config["method"].items()}
    if "name" in (differs.get("method") or {}):
        config["method"] = differs.pop("method")
    student, teacher = config["model"]["student"], config["model"]["teacher"]
    student["init"] = None
    if trained == "teacher":
        student |= {key: copy.deepcopy(teacher.get(key)) for key in _MODEL_KEYS}
        teacher |= {"path": None, "recipe": None}
    merge(config, differs)
    config["run"] |= {"name": f"{raw['run']['name']}/{name}", "resume": "auto"}
    if trained == "teacher" and not any(student.get(key) for key in ("init", "path", "recipe")):
        remedy = "set model/teacher=path model.teacher.path=FOLDER_OR_HUB_ID"
        raise ConfigError(f"model/teacher=none: stages.{name} trains the teacher; {remedy}")
    return config


def begun(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with model.student.init, if it has one, in the place of the student's own weights."""
    init = raw.get("model", {}).get("student", {}).get("init")
    if init is None:
        return raw
    config = copy.deepcopy(raw)
    student = config["model"]["student"]
    student["init"] = None
    if raw.get("mode") != "scores" or not str(init).startswith(REFERENCE):  # a stage that scores do not read: no folder
        student |= {"path": init, "revision": None, "recipe": None}
    return config


def _parsed(raw: dict[str, Any]) -> Config:
    """The typed config, references in it."""
    return parse(begun(raw), METHODS[raw["method"]["name"]].Config)


def merge(config: dict[str, Any], differs: dict[str, Any]) -> None:
    """Change a config to what `differs` says, key by key."""
    for key, value in differs.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


def _check(name: str, raw: dict[str, Any]) -> None:
    """Refuse a stage's config, with its keys as the user has them."""
    if raw["mode"] not in _MODES:
        raise ConfigError(f"stages.{name}.mode={raw['mode']}: a stage makes something; use {', '.join(_MODES)}")
    try:
        validated(begun(raw))
    except ConfigError as error:
        raise of_stage(name, error) from None


def of_stage(name: str, error: OpdError) -> OpdError:
    """The same error, said of this stage."""
    opening = f"stages.{name}." if isinstance(error, ConfigError) else f"stage {name}: "
    return type(error)("\n".join(opening + line for line in str(error).splitlines()))


def kind_of(raw: dict[str, Any]) -> str:
    """What the config makes: its method's name, or what it holds."""
    return str(raw["method"]["name"] if raw["mode"] == "train" else raw["mode"])


def resolved(value: Any, stages: dict[str, Stage]) -> Any:
    """The config with folders for references, but for those to stages that are named and not read."""
    if isinstance(value, dict):
        return {key: resolved(item, stages) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(REFERENCE):
        stage = stages.get(value.removeprefix(REFERENCE))
        return value if stage is None else str(stage.result)
    return value
