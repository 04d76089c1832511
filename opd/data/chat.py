"""One row -> ids and a loss mask, through the tokenizer's chat template or, without one, as plain text.

The prompt ids are what the model is given when it samples. The completion ids are what follows them in the
rendered conversation, so the template must render a conversation's beginning the same whether or not more
follows (be prefix-stable); where it does not, the row is refused. Masks come from these lengths, never from
comparing ids to pad.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from opd.data.columns import Conversation, Message, RunningText, read_columns, row_refusal
from opd.errors import ConfigError
from opd.protocols import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_TEMPLATE = "set model.student.chat_template=training (TRL's, which strips nothing, for families it knows)"
Span = tuple[int, int]
_SHARED: dict[int, int] = {}  # one object an id, not one a token: rows then take 8 bytes a token instead of 40


def render(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: Literal["all", "last"],
    stop_ids: frozenset[int],
    row: int,
    where: str,
) -> Example:
    """The row in the tokenizer's ids, from the first of these columns that it has.

    `messages`: turns "last" makes the last message, if it is the assistant's, the completion and all before
    it the prompt; "all" makes every assistant turn loss tokens, and the prompt ends where the first begins.
    `prompt` (a string, which is one user message, or messages) and `completion` (a string, which is one
    assistant message, or messages): loss tokens in the completion only. `text`, for turns "all": no prompt,
    every token is a loss token but the BOS that the tokenizer puts in front.

    A completion ends in a stop token: what a template writes behind a turn's end (a line break, say) is no
    loss token, behind the last turn it is cut, and where nothing ends the last turn the EOS is appended. Stop
    tokens inside the content stay. Without an assistant turn `completion_ids` is None.

    A tokenizer without a template reads the contents one after the other with nothing between, behind its BOS
    if it adds one; nothing but the EOS at the very end then marks the turns.

    `row` is the row's number in its file, `where` names the file ("data.path=…"); they open every
    ConfigError, which is one line.
    """
    place = f"{where}, row {row}"
    content = read_columns(fields, turns, place)
    renderer = _Renderer(tokenizer, stop_ids, place)
    if isinstance(content, RunningText):
        prompt_ids, completion_ids, mask = renderer.running_text(content.text)
    else:
        prompt_ids, completion_ids, mask = renderer.conversation(content)
    if mask is not None and all(mask):
        mask = None
    return Example(row, prompt_ids, completion_ids, mask, fields=dict(fields))


def render_messages(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str, *, open_turn: bool
) -> list[int]:
    """The messages' ids as `render` makes those of a prompt; `open_turn`: with the assistant's turn opened behind them.

    Without it they are a piece of a conversation, and a tokenizer without a template puts no BOS before them.
    """
    return _Renderer(tokenizer, frozenset(), place).messages(messages, open_turn=open_turn)


@dataclass(frozen=True)
class _Renderer:
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    place: str

    def refusal(self, problem: str, remedy: str) -> ConfigError:
        return row_refusal(self.place, problem, remedy)

    def conversation(self, content: Conversation) -> tuple[list[int], list[int] | None, list[bool] | None]:
        if not content.loss_turns:
            return self.nonempty(self.messages(content.messages, open_turn=True)), None, None
        spans_of = self.template_spans if self.tokenizer.chat_template else self.plain_spans
        # Behind the last loss token nothing is predicted, so nothing is kept.
        messages = content.messages[: content.loss_turns[-1] + 1]
        ids, spans = spans_of(messages, content.loss_turns)
        start, end = spans[0][0], spans[-1][1]
        mask = [False] * (end - start)
        for first, last in spans:
            mask[first - start : last - start] = [True] * (last - first)
        completion_ids = self.closed(ids[start:end])
        mask += [True] * (len(completion_ids) - len(mask))
        return self.nonempty(ids[:start]), completion_ids, mask

    def messages(self, messages: list[Message], *, open_turn: bool) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.ids("".join(message["content"] for message in messages), bos=open_turn)
        text = self.template(messages, open_turn=open_turn)
        self.check_shown(messages, None, text)
        return self.ids(text)

    def running_text(self, text: str) -> tuple[list[int], list[int], list[bool]]:
        ids = self.nonempty(self.ids(text, bos=True))
        num_bos = len(ids) - len(self.ids(text))
        ids = self.closed(ids)
        return [], ids, [k >= num_bos for k in range(len(ids))]

    def closed(self, completion_ids: list[int]) -> list[int]:
        """The ids with a stop token at their end."""
        if completion_ids and completion_ids[-1] in self.stop_ids:
            return completion_ids
        eos: Any = self.tokenizer.eos_token_id
        if eos is None:
            problem = "the completion does not end in a stop token, and the tokenizer has no EOS to append"
            raise self.refusal(problem, "give the tokenizer an eos_token")
        return [*completion_ids, eos]

    def template_spans(self, messages: list[Message], loss_turns: list[int]) -> tuple[list[int], list[Span]]:
        """The rendered messages, which end in the last loss turn, and where in them each loss turn lies."""
        whole_text = self.template(messages, open_turn=False)
        whole = self.ids(whole_text)
        spans = []
        for turn in loss_turns:
            is_last = turn == len(messages) - 1
            before_text = self.template(messages[:turn], open_turn=True)
            after_text = whole_text if is_last else self.template(messages[: turn + 1], open_turn=False)
            before, after = self.ids(before_text), whole if is_last else self.ids(after_text)
            start = len(before)
            if not after_text.startswith(before_text) or after[:start] != before:
                raise self.unstable_header(turn, in_text=not after_text.startswith(before_text))
            self.check_shown(messages, turn, after_text[len(before_text) :])
            end = start + self.turn_length(after[start:], messages[turn]["content"])
            # Behind the turn's end they may differ: some templates write an EOS behind the whole only.
            if whole[:end] != after[:end]:
                raise self.unstable_history(turn)
            spans.append((start, end))
        self.check_shown(messages, None, whole_text)
        return whole, spans

    def check_shown(self, messages: list[Message], turn: int | None, text: str) -> None:
        """Refuses a template that leaves out this turn (None: what a user says), as those for images do."""
        shown = [k for k, m in enumerate(messages) if m["role"] == "user"] if turn is None else [turn]
        for k in shown:
            # A template may trim the content, and take the thoughts out of it.
            if messages[k]["content"].split("</think>")[-1].strip() not in text:
                problem = f"the chat template does not show the content of message {k} (counted from 0)"
                raise self.refusal(problem, "set a chat template for messages whose content is a string")

    def unstable_header(self, turn: int, *, in_text: bool) -> ConfigError:
        problem = f"the chat template is not prefix-stable at message {turn} (counted from 0)"
        if not in_text:
            remedy = "end the generation prompt in a line break or a special token"
            return self.refusal(f"{problem}: a token reaches across the boundary of the turn", remedy)
        problem += ": what it opens the assistant's turn with (<think>, say) is not how the finished turn begins"
        return self.refusal(problem, f"{TRAINING_TEMPLATE}, or a file that shows a finished turn as it was sampled")

    def unstable_history(self, turn: int) -> ConfigError:
        problem = f"the chat template is not prefix-stable at message {turn} (counted from 0)"
        remedy = (
            f"{TRAINING_TEMPLATE}, or a file that renders a turn the same whether or not more follows; "
            "or train on the last turn only, or remove from the data what the template strips"
        )
        return self.refusal(f"{problem}: it changes (earlier <think> text, say) once more follows", remedy)

    def turn_length(self, ids: list[int], content: str) -> int:
        """Tokens of a turn up to the first stop token behind its content; all if the template writes none."""
        stops = [k for k, token in enumerate(ids) if token in self.stop_ids]
        if not stops:
            return len(ids)
        in_content = sum(token in self.stop_ids for token in self.ids(content))
        return stops[in_content] + 1 if in_content < len(stops) else len(ids)

    def plain_spans(self, messages: list[Message], loss_turns: list[int]) -> tuple[list[int], list[Span]]:
        text = ""
        ids: list[int] = []
        spans = []
        for turn, message in enumerate(messages):
            text += message["content"]
            joint = self.ids(text, bos=True)
            # Where the two would merge into one token the turn is tokenised on its own: a model that samples
            # is given the prompt's ids, and cannot merge its own into them either.
            grown = joint if joint[: len(ids)] == ids else ids + self.ids(message["content"])
            if turn in loss_turns:
                spans.append((len(ids), len(grown)))
            ids = grown
        return ids, spans

    def template(self, messages: list[Message], *, open_turn: bool) -> str:
        """The rendered text; `open_turn` writes the header of the assistant's next turn behind it."""
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False)
        except (jinja2.TemplateError, TypeError) as error:
            problem = f"the chat template refuses this row ({error})"
            raise self.refusal(problem, "change the row's messages, or the template") from error
        return str(text)

    def ids(self, text: str, *, bos: bool = False) -> list[int]:
        """The text's ids; `bos` puts in front the BOS that the tokenizer adds by itself, if it is not there.

        Rendered text brings its own special tokens, so that the tokenizer must add none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"half a character ({text[error.start]!a}, a lone surrogate)"
            raise self.refusal(problem, "repair the row's text") from error
        read = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [_SHARED.setdefault(token, token) for token in read]
        own: Any = self.tokenizer.bos_token_id
        if not bos or own is None or ids[:1] == [own]:
            return ids
        adds_bos = list(self.tokenizer("a")["input_ids"])[:1] == [own]
        return [own, *ids] if adds_bos else ids

    def nonempty(self, ids: list[int]) -> list[int]:
        if not ids:
            raise self.refusal("no tokens are left of the prompt", "fill it in or remove the row")
        return ids
