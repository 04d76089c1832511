"""Chat templates: the tokenizer's own, a file's, a packaged one, or TRL's for training; and the thinking mode."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from opd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING = "training"
_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout, inside it in a wheel.
_PACKAGED = (_PACKAGE / "conf" / "chat_templates", _PACKAGE.parent / "conf" / "chat_templates")
_FIXED = re.compile(r"\{%- set enable_thinking = (true|false) %\}")


def set_template(tokenizer: PreTrainedTokenizerBase, chosen: str | None, thinking: bool | None, prefix: str) -> None:
    """Give the tokenizer the template that the config chooses; it is saved with the tokenizer.

    `chosen`: None leaves its own; "training" is the one that TRL has for its family; else a file, or the name of a
    packaged template. `thinking` fixes enable_thinking for every rendering. `prefix` and a name make the config's key
    ("model.student."). Raises ConfigError, in one line.
    """
    if chosen == TRAINING:
        tokenizer.chat_template = _training_template(tokenizer, f"{prefix}chat_template={chosen}")
    elif chosen is not None:
        tokenizer.chat_template = _read(template_file(chosen, prefix), f"{prefix}chat_template={chosen}")
    if thinking is not None:
        tokenizer.chat_template = _with_thinking(tokenizer, thinking, f"{prefix}thinking={str(thinking).lower()}")
    if chosen is not None or thinking is not None:
        _check(tokenizer, f"{prefix}chat_template={chosen}")


def check_system_prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> None:
    """Refuse a system prompt that the template does not take, or leaves out without a word."""
    if not tokenizer.chat_template:
        return
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": "a"}]
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
        problem = "" if system_prompt.strip() in str(shown) else "does not show a system message"
    except (jinja2.TemplateError, TypeError) as error:
        problem = f"refuses a system message ({' '.join(str(error).split())})"
    if problem:
        setting = f"data.system_prompt={' '.join(system_prompt.split())}"
        remedy = "set it to null, or model.student.chat_template to one that does"
        raise ConfigError(f"{setting}: the student's chat template {problem}; {remedy}")


def template_digest(chosen: str) -> str:
    """What tells one template from another, whatever name it goes by."""
    if chosen == TRAINING:
        return f"training of trl {metadata.version('trl')}"
    return hashlib.blake2b(template_file(chosen, "model.").read_bytes(), digest_size=16).hexdigest()


def packaged_templates() -> dict[str, Path]:
    """The templates that come with opd, by name."""
    return {file.stem: file for folder in _PACKAGED for file in sorted(folder.glob("*.jinja"))}


def template_file(chosen: str, prefix: str) -> Path:
    """The file of a chosen template, or the packaged one of that name. Raises ConfigError, in one line."""
    file, packaged = Path(chosen), packaged_templates()
    if not file.is_file() and chosen not in packaged:
        names = ", ".join([TRAINING, *sorted(packaged)])
        problem = f"no such file (looked from {Path.cwd()})"
        raise ConfigError(
            f"{prefix}chat_template={chosen}: {problem}; name a file with a Jinja template, or one of {names}"
        )
    return file if file.is_file() else packaged[chosen]


def _read(file: Path, setting: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot be read as UTF-8 text ({error}); mend the file") from None


def _training_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> str:
    from trl.chat_template_utils import get_training_chat_template  # noqa: PLC0415  seconds, and few runs ask for it

    if not tokenizer.chat_template:
        problem = f"{tokenizer.name_or_path} has no chat template of which TRL could know one for training"
        raise ConfigError(f"{setting}: {problem}; name a file, or one of {', '.join(sorted(packaged_templates()))}")
    try:
        return get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except ValueError:
        problem = f"TRL has no training template for that of {tokenizer.name_or_path}"
    except (jinja2.TemplateError, TypeError) as error:  # it renders a tool call to see whether it need look further
        problem = f"TRL cannot read the template of {tokenizer.name_or_path} ({error})"
    raise ConfigError(f"{setting}: {problem}; name a file whose template renders a turn the same whatever follows it")


def _with_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool, setting: str) -> str:
    """The template with enable_thinking fixed: what is set in its head stands above what a caller hands over."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    template = _FIXED.sub("", template, count=1) if _FIXED.match(template) else template
    if not re.search(r"\benable_thinking\b", template):
        problem = f"the chat template of {tokenizer.name_or_path} knows no enable_thinking"
        raise ConfigError(f"{setting}: {problem}; set it to null, or choose a model with a thinking mode")
    return f"{{%- set enable_thinking = {str(thinking).lower()} %}}{template}"


def _check(tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{setting}: not a Jinja template (line {error.lineno}: {error}); mend it") from None
    except (jinja2.TemplateError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{setting}: cannot render a user's message ({problem}); mend it") from None
