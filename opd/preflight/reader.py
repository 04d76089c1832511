"""One model as the checks of the pair see it, all of it from its small files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opd.config import Config
from opd.data.chat import render_messages
from opd.data.columns import Message
from opd.errors import ConfigError
from opd.loading import Readers

STUDENT = "model.student.path"
_LONGEST = 90  # characters of a text that are shown to either side of where it matters
_ANSWER = "Seven"


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, its embedding table's rows, and where it stops."""

    key: str
    path: str
    tokenizer: Any
    width: int
    stops: frozenset[int]
    thinking: bool | None  # as configured

    @classmethod
    def of(cls, key: str, readers: Readers, config: Config) -> Reader:
        """The model that this key of the config names."""
        model = config.model.student if key == STUDENT else config.model.teacher
        width, stops = readers.shapes[key].vocab_size, readers.stops[key]
        return cls(key, readers.paths[key], readers.tokenizers[key], width, stops, model.thinking)

    @property
    def setting(self) -> str:
        """Key and value, as they open a finding."""
        return f"{self.key}={self.path}"

    @property
    def section(self) -> str:
        """The part of the config that says how this model is read."""
        return "model.student" if self.key == STUDENT else "model.teacher"

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The tokenizer's tokens with their ids; of a hundred thousand, so it is asked for once."""
        return self.tokenizer.get_vocab()

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts its BOS before plain text by itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("a")["input_ids"])[:1] == [bos]

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that the template writes behind an answer; None: it writes none, or has no template."""
        if not self.has_template:
            return None
        text = self.rendered([{"role": "user", "content": "Say a number"}, {"role": "assistant", "content": _ANSWER}])
        if text is None or _ANSWER not in text:
            return None
        behind = self.tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values(), *self.stops}
        return next((token for token in behind if token in special), None)

    def token(self, number: int) -> str:
        """The token of an id, quoted."""
        return repr(self.tokenizer.convert_ids_to_tokens(number))

    def tokens(self, numbers: list[int] | frozenset[int]) -> str:
        """Several of them."""
        return ", ".join(map(self.token, sorted(numbers))) or "nothing"

    def prompt(self, messages: list[Message]) -> list[int] | None:
        """The ids that this model is given to answer to, rendered as a row of data is; None: it refuses them."""
        try:
            return render_messages(messages, self.tokenizer, self.setting, open_turn=True)
        except ConfigError:
            return None

    def rendered(self, messages: list[Message], *, opens: bool = False, **settings: Any) -> str | None:
        """The template's text; None: it refuses the messages, whatever it raises."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **settings)
        except Exception:  # a template raises what it likes
            return None
        return str(text)

    def text(self, ids: list[int]) -> str:
        """The ids as text, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def quoted(text: str, at: int = 0) -> str:
    """The text in one line, cut to what lies around this character."""
    first, last = max(at - _LONGEST, 0), at + _LONGEST
    return f"{'…' if first else ''}{text[first:last]!r}{'…' if last < len(text) else ''}"
