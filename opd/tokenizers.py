"""Tokenizers, what a model's config says before a weight is loaded, and the ids that several models share."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from opd.adapter_folder import adapter_settings
from opd.config import Model
from opd.data.templates import set_template
from opd.errors import ConfigError

COMPLETE = "give a complete folder, as save_pretrained of model and tokenizer write it"


@dataclass(frozen=True)
class Vocabulary:
    """The ids that student and teacher share, and how completions end."""

    size: int  # columns of both heads that are compared: the smaller of the two widths
    stop_ids: frozenset[int]  # tokenizer.eos and every eos of the generation config
    pad_id: int  # fills; never read as a mask


def load_tokenizer(model: Model, path: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model. `key` names the setting in errors, e.g. model.teacher.path."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # it reads config.json too, whose checks raise types of their own
        _refuse_code(error, path, key)
        _refuse_hub_id(model, path, f"{key}={path}", error)
        raise ConfigError(f"{key}={path}: no tokenizer loads from it ({first_line(error)}); {COMPLETE}") from None
    # Without tokenizer files transformers makes a tokenizer of a few special tokens.
    if set(tokenizer("a", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise ConfigError(f"{key}={path}: no tokenizer lies there; {COMPLETE}")
    set_template(tokenizer, model.chat_template, model.thinking, f"{key.rsplit('.', 1)[0]}.")
    return tokenizer


def _refuse_code(error: Exception, path: str, key: str) -> None:
    """Raise ConfigError if it was code that the model brings which stood in the way."""
    if "trust_remote_code" in str(error):
        setting = f"{key.rsplit('.', 1)[0]}.trust_remote_code"
        problem = "needs Python code that it brings (auto_map in its config), and that is not run unasked"
        raise ConfigError(f"{key}={path}: {problem}; read that code, then set {setting}=true") from None


def _refuse_hub_id(model: Model, path: str, setting: str, error: Exception) -> None:
    """Raise ConfigError, which `setting` opens, if it was the hub, or the lack of it, which stood in the way."""
    if Path(path).exists() or not isinstance(error, OSError):
        return
    if constants.HF_HUB_OFFLINE:
        revision = f" (revision {model.revision})" if model.revision is not None else ""
        problem = f"no such folder, and this hub id is not in the cache{revision} while HF_HUB_OFFLINE is set"
        raise ConfigError(f"{setting}: {problem}; unset HF_HUB_OFFLINE, or give a folder") from None
    if "valid git identifier" in str(error):
        revision = f"{setting.partition('=')[0].rsplit('.', 1)[0]}.revision={model.revision}"
        raise ConfigError(f"{revision}: {setting} has no such revision; name a branch, tag or commit") from None
    problem = f"no such folder, and the hub does not give it ({first_line(error)})"
    raise ConfigError(f"{setting}: {problem}; check the id and the network, or log in (hf auth)") from None


@dataclass(frozen=True)
class Shape:
    """What a model's config says before a weight is loaded."""

    vocab_size: int  # rows of the embedding table
    max_positions: int | None  # the longest sequence it was made for; None where its config names no limit


def read_shape(model: Model, path: str, key: str) -> Shape:
    """The shape of a model, from its config.json."""
    base = base_of_adapter(path, key)
    setting = f"{key}={path}" if base is None else f"{key}={path} (an adapter of {base})"
    try:
        config = AutoConfig.from_pretrained(
            base or path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        _refuse_code(error, path, key)
        _refuse_hub_id(model, base or path, setting, error)
        raise ConfigError(
            f"{setting}: its config.json is of no model that transformers knows ({first_line(error)}); "
            "choose another folder, or upgrade transformers"
        ) from None
    text = config.get_text_config()
    return Shape(int(text.vocab_size), getattr(text, "max_position_embeddings", None))


def stop_ids(tokenizer: PreTrainedTokenizerBase, path: str, model: Model) -> frozenset[int]:
    """Every id that ends a completion: the tokenizer's eos and those of the model's generation config."""
    ids: list[Any] = [tokenizer.eos_token_id]
    path = base_of_adapter(path, "model.path") or path  # the folder of an adapter has no generation config
    try:
        more = GenerationConfig.from_pretrained(path, revision=model.revision or "main").eos_token_id
        ids += more if isinstance(more, list) else [more]
    except OSError:
        pass  # many folders have no generation config; the tokenizer's eos stands
    return frozenset(stop for stop in ids if isinstance(stop, int))


def shared_vocabulary(
    student: PreTrainedTokenizerBase,
    teachers: Mapping[str, PreTrainedTokenizerBase],
    widths: list[int],
    stops: frozenset[int],
    key: str = "model.student.path",
) -> Vocabulary:
    """What all models can score. Padded embedding tables are cut; tokenizers that differ are refused.

    `teachers`: by the key that names each; `key`: the one that names `student`.
    """
    size = min(widths)
    if not stops:
        raise ConfigError(
            f"{key}={student.name_or_path}: its tokenizer has no eos token, so no completion can end; "
            "set eos_token in its tokenizer_config.json"
        )
    mine = student.get_vocab()
    for name, teacher in teachers.items():
        theirs = teacher.get_vocab()
        differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        if differing:
            token = differing[0]
            raise ConfigError(
                f"{name}={teacher.name_or_path}: its tokenizer is not the student's: {len(differing)} "
                f"tokens differ, e.g. {token!r} is id {mine.get(token)} for the student and {theirs.get(token)} for "
                "the teacher; choose a teacher of the same family, or method=gold"
            )
    num_ids = max(mine.values()) + 1
    if num_ids > size:
        raise ConfigError(
            f"{key}={student.name_or_path}: its tokenizer has ids up to {num_ids - 1} but the heads share "
            f"only {size} columns; choose a teacher whose embedding table covers the tokenizer"
        )
    pad = student.pad_token_id
    return Vocabulary(size, stops, int(pad) if isinstance(pad, int) else min(stops))


def base_of_adapter(path: str, key: str) -> str | None:
    """The model that an adapter folder belongs to; None for any other folder."""
    settings = None if (Path(path) / "config.json").is_file() else adapter_settings(path, key)
    if settings is None:
        return None
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{key}={path}: an adapter that does not name its base model; merge it into a model first")
    if Path(base).is_absolute() and not Path(base).is_dir():
        problem = f"an adapter whose base model {base} is not there"
        raise ConfigError(f"{key}={path}: {problem}; set base_model_name_or_path in its adapter_config.json to it")
    return str(base)


def first_line(error: Exception) -> str:
    """What another library said, short enough for a refusal of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …")
