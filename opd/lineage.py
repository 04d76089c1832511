"""What decides what a run becomes: the keys, the folders and files it reads, by content, and the code.

The digest of it is the address of a stage's result (opd.stages), so it has to hold every such thing, or a stage would
be taken for another; and none besides, or a stage would be made twice. A hub id stands for itself, by its revision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd.artifacts.store import Store, source_version
from opd.config import Config
from opd.data.templates import template_digest
from opd.methods import METHODS
from opd.protocols import Needs, TeacherNeed

REFERENCE = "stage:"  # opens the name of a stage where a folder may stand
# Keys that change what a run costs, logs or keeps, but not its result.
_FREE = {
    "model.student": ("init", "gradient_checkpointing"),
    "train": (
        "micro_batch_size",
        "packing",
        "eval_every_steps",
        "save_every_steps",
        "save_every_epoch",
        "keep_checkpoints",
        "log_every_steps",
        "sample_every_steps",
    ),
    "rollout": ("batch_size",),
}
# Keys that name a file or a folder, beside those of a method.
_FILES = (
    "data.path",
    "data.eval_path",
    "data.responses",
    *(f"model.{role}.{key}" for role in ("student", "teacher") for key in ("path", "chat_template")),
)
_CODE = (
    "data",
    "distributed.py",
    "loading.py",
    "model_loading.py",
    "models.py",
    "objectives",
    "precompute.py",
    "protocols.py",
    "quantization.py",
    "randomness.py",
    "sources",
    "teachers",
    "tokenizers.py",
    "trainer.py",
    "window.py",
)


def references(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, name of the stage) of every reference in a raw config."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from references(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and value.startswith(REFERENCE):
        yield key, value.removeprefix(REFERENCE)


def is_read(config: Config, key: str) -> bool:
    """Whether the run reads the folder at this key: a method may name teachers that it then does not ask."""
    needs = _needs(config)
    asked = {need.model for need in needs.asked(config.mode).values()}
    if key.startswith("method."):
        return key in asked
    if key == "data.responses":
        return needs.stored_responses and config.mode != "responses"
    if key == "model.student.init":
        return config.mode != "scores"  # where only its tokenizer is read, which training leaves alone
    if key == "model.teacher.path":
        return "teacher" in asked or config.trains or config.mode == "eval"  # evaluation measures by it
    return True


def recipe(
    name: str, raw: dict[str, Any], config: Config, store: Store, places: Mapping[str, Path]
) -> tuple[dict[str, Any], list[Path]]:
    """Everything that decides the result of the run that `raw` and `config` both are, and the folders it reads.

    `places`: the artefacts of the stages that it refers to; a reference counts as their address. `name` is only for
    people who list artefacts.
    """
    parts, inputs = _parts(raw, config), []
    files = {*_FILES, *config.data.paths, *(need.model for need in _needs(config).teachers.values())}

    def content(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            free = _FREE.get(key, ())
            return {inner: content(item, f"{key}.{inner}") for inner, item in value.items() if inner not in free}
        if not isinstance(value, str) or not (value.startswith(REFERENCE) or key in files):
            return value
        if not is_read(config, key):
            return None
        if value.startswith(REFERENCE):
            place = places.get(value.removeprefix(REFERENCE))
            if place is None:
                return None
            inputs.append(place)
            return place.name
        if key.endswith(".chat_template"):
            return template_digest(value)
        if not (path := Path(value).expanduser()).exists():
            return value  # a hub id
        inputs.append(path)
        return store.content_digest(path)

    found = {
        "stage": name,
        "mode": config.mode,
        "seed": config.run.seed,
        **{section: content(value, section) for section, value in parts.items()},
        "hardware": {"device": config.hardware.device, "precision": config.hardware.precision},
        "code": source_version(_code(config, parts)),
    }
    return found, list(dict.fromkeys(inputs))


def _parts(raw: dict[str, Any], config: Config) -> dict[str, dict[str, Any]]:
    """The sections that decide the result; where nothing is trained, of the method only what it asks for."""
    needs, method = _needs(config), raw["method"]
    asked = needs.asked(config.mode)
    models = {"student": dict(raw["model"]["student"])}
    if any(not need.is_student for need in asked.values()):
        models["teacher"] = dict(raw["model"]["teacher"])  # its settings also load teachers of other folders
        if all(need.model != "teacher" for need in asked.values()):
            models["teacher"] |= {"path": None, "revision": None, "recipe": None}
    if config.mode != "train":
        models["student"]["lora"] = None  # an adapter that nothing has trained changes nothing
        folders = {key: method[key] for key in method if f"method.{key}" in {need.model for need in asked.values()}}
        read = {**_told(needs), "teachers": {name: _told(need) for name, need in asked.items()}}
        method = {"name": method["name"], "top_k": method.get("top_k"), **folders, "needs": read}
    parts = {"method": method, "model": models, "data": raw["data"]}
    if config.mode == "train":
        parts["train"] = raw["train"]
    if config.mode == "responses" or (config.mode == "train" and needs.rollouts):
        parts["rollout"] = raw["rollout"]
    return parts


def _code(config: Config, parts: dict[str, dict[str, Any]]) -> list[str]:
    """The source files that decide the result."""
    methods = {config.method.name} if config.mode == "train" else set()
    embedded = any(model["path"] is None and model["recipe"] for model in parts["model"].values())
    if embedded:
        methods.add("sft")
    return [*_CODE, *(f"methods/{name}.py" for name in sorted(methods)), *(["embedded.py"] if embedded else [])]


def _told(needs: Needs | TeacherNeed) -> dict[str, Any]:
    """What it says, without what goes without saying."""
    default = asdict(type(needs)())
    return {name: value for name, value in asdict(needs).items() if value != default[name]}


def _needs(config: Config) -> Needs:
    return METHODS[config.method.name](config.method).needs
