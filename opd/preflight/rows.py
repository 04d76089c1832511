"""Some rows once more: rendered by another way than the data was, and compared with what training will read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from opd.config import Config
from opd.data.columns import LAYOUTS, Conversation, Message, read_columns, with_system_prompt
from opd.data.origins import columns_of
from opd.data.preference import split_pair
from opd.errors import ConfigError
from opd.loading import Texts
from opd.preflight.findings import Finding, Severity
from opd.protocols import Example, Needs

_RENDERED = 256  # rows that are rendered again
_MANY = 0.01

# What a row can have: (severity, what is said of the rows, why, remedy).
_TOLD: dict[str, tuple[Severity, str, str, str]] = {
    "data.open_turn": (
        "warning",
        "rows end their prompt in an assistant turn",
        "the student answers itself, in a second turn of its own",
        "end the prompt in the user's turn, or learn that answer too",
    ),
    "data.prompt_cut": (
        "error",
        "prompts lack their beginning",
        "a prompt without its head is another prompt",
        "drop rows that are too long instead of cutting them",
    ),
    "data.prompt": (
        "warning",
        "prompts are not what the chat template writes",
        "the student is asked otherwise than it will be used",
        "look at the template and at data.system_prompt",
    ),
    "data.teacher_prompt": (
        "error",
        "teacher's prompts lack the student's question",
        "the teacher answers another question than the student",
        "drop rows that are too long, or raise method.max_privileged_length",
    ),
    "data.end": (
        "error",
        "uncut answers do not end in a stop token that is learnt",
        "the student never learns to stop",
        "learn the end; a mask made by comparing ids with pad loses it where pad is eos",
    ),
    "data.mask": (
        "error",
        "loss masks are not the assistant's turns",
        "the student learns what the user says, or not all of its own",
        "make the mask from lengths while rendering, turn by turn",
    ),
    "data.echo": ("warning", "answers repeat the question", "they teach to repeat it", "remove these rows"),
}


def check_rows(config: Config, needs: Needs, texts: Texts, rows: Sequence[Example], looked: str) -> list[Finding]:
    """What some rows have that they should not; all answers' ends, and up to 256 rows rendered again."""
    found: dict[str, list[int]] = {name: [] for name in _TOLD}
    step = max(len(rows) // _RENDERED, 1)
    again = rows[::step][:_RENDERED]
    for row in rows:
        if not _ends_learnt(config, texts, row):
            found["data.end"].append(row.row)
    for row in again:
        for name in _problems(config, needs, texts, row):
            found[name].append(row.row)
    return [
        _finding(name, numbers, looked if name == "data.end" else f"{len(again):,} rows rendered again", len(again))
        for name, numbers in found.items()
        if numbers
    ]


def _finding(name: str, numbers: list[int], looked: str, size: int) -> Finding:
    severity, what, why, remedy = _TOLD[name]
    if name == "data.echo" and len(numbers) <= _MANY * size:
        severity = "note"
    return Finding(name, severity, f"{len(numbers):,} {what} ({looked}; the first is row {numbers[0]})", why, remedy)


def _ends_learnt(config: Config, texts: Texts, row: Example) -> bool:
    """Whether every answer that was not cut ends in a stop token, and the mask holds it."""
    stops, limit = texts.vocabulary.stop_ids, config.data.max_completion_length
    answers = [row.completion_ids, row.alternatives.get("rejected")]
    whole = [answer for answer in answers if answer and len(answer) < limit]
    mask = row.completion_mask
    is_masked = mask is not None and len(mask) < limit and not mask[-1]
    return not is_masked and all(answer[-1] in stops for answer in whole)


def _problems(config: Config, needs: Needs, texts: Texts, row: Example) -> list[str]:
    content = _conversation(config, needs, row.fields)
    if content is None:
        return []
    turns, found = content.loss_turns, []
    prompt = content.messages[: turns[0]] if turns else content.messages
    if prompt[-1]["role"] == "assistant":
        found.append("data.open_turn")
    if name := _prompt_problem(texts.tokenizer, prompt, row.prompt_ids):
        found.append(name)
    question = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "").strip()
    if not _is_shown_to_teacher(needs, texts, row, question):
        found.append("data.teacher_prompt")
    if row.completion_ids is None or not turns:
        return found
    if question and content.messages[turns[0]]["content"].strip() == question:
        found.append("data.echo")
    is_cut = len(row.completion_ids) >= config.data.max_completion_length
    if not needs.prompt_loss and not _mask_fits(texts, content, row, is_cut=is_cut):
        found.append("data.mask")
    return found


def _conversation(config: Config, needs: Needs, fields: Mapping[str, Any]) -> Conversation | None:
    """The row as messages; None where it is running text, or cannot be read again."""
    origin = config.data.sources.get(str(fields.get("source")), config.data)
    named = columns_of(origin).keys()
    layouts = [layout for layout in LAYOUTS if layout & named]
    hidden = frozenset().union(*LAYOUTS).difference(*layouts) if layouts else frozenset()
    read = {name: value for name, value in fields.items() if name not in hidden}
    try:
        pair = split_pair(read, "", need_rejected=needs.pairs)
        if pair is not None:
            read = {name: value for name, value in read.items() if name not in ("messages", "text")} | pair["chosen"]
        content = read_columns(with_system_prompt(read, config.data.system_prompt), needs.turns, "")
    except ConfigError:
        return None
    return content if isinstance(content, Conversation) else None


def _prompt_problem(tokenizer: Any, prompt: list[Message], ids: list[int]) -> str | None:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    else:
        text = "".join(message["content"] for message in prompt)
    whole = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if ids == whole:
        return None
    if len(ids) < len(whole) and whole[len(whole) - len(ids) :] == ids:
        return "data.prompt_cut"
    # Without a template a BOS may stand in front, and turns be cut apart.
    return "data.prompt" if tokenizer.chat_template else None


def _is_shown_to_teacher(needs: Needs, texts: Texts, row: Example, question: str) -> bool:
    """Whether a teacher with more to read also reads what the student is asked."""
    settings, theirs = needs.privileged, row.teacher_prompts.get("teacher")
    if settings is None or theirs is None or settings.teacher_prompt == "full" or "{user}" not in settings.template:
        return True
    return _as_decoded(texts.tokenizer, question) in _text(texts.tokenizer, theirs)


def _mask_fits(texts: Texts, content: Conversation, row: Example, *, is_cut: bool) -> bool:
    """Whether the runs of loss tokens are the assistant's turns, and nothing that another role said."""
    turns, messages = content.loss_turns, content.messages
    if any(later - turn == 1 for turn, later in pairwise(turns)):
        return True  # without a template such turns are one run
    runs = _loss_texts(texts.tokenizer, row)
    if len(runs) != len(turns) and not is_cut:
        return False
    others = [_as_decoded(texts.tokenizer, m["content"]) for m in messages if m["role"] != "assistant"]
    for run, turn in list(zip(runs, turns, strict=False))[: -1 if is_cut else None]:
        said = _as_decoded(texts.tokenizer, messages[turn]["content"])
        heard = [other for other in others if other in run.replace(said, "", 1)]
        # What the template itself writes says nothing of who spoke: "end" stands in every <|im_end|>.
        if said not in run or any(other not in _frame(texts.tokenizer, messages) for other in heard if other):
            return False
    return True


def _frame(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation with nothing said in it, and the end of an answer."""
    silent = [{**message, "content": "?"} for message in messages]
    text = tokenizer.apply_chat_template(silent, tokenize=False) if tokenizer.chat_template else ""
    return _as_decoded(tokenizer, f"{text}{tokenizer.eos_token or ''}")


def _loss_texts(tokenizer: Any, row: Example) -> list[str]:
    """The runs of loss tokens, decoded."""
    ids = row.completion_ids or []
    runs: list[list[int]] = []
    was_loss = False
    for token, is_loss in zip(ids, row.completion_mask or [True] * len(ids), strict=True):
        if is_loss and not was_loss:
            runs.append([])
        if is_loss:
            runs[-1].append(token)
        was_loss = is_loss
    return [_text(tokenizer, run) for run in runs]


def _as_decoded(tokenizer: Any, text: str) -> str:
    """The text as it comes back from ids: tokenizers may normalise it. A template may trim it."""
    return _text(tokenizer, tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]).strip()


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
