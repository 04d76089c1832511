"""What either model is given to answer to: templates, thinking mode, BOS, and turns that change behind one's back."""

from __future__ import annotations

from itertools import zip_longest

from opd.config import Config
from opd.data.columns import Message
from opd.preflight.findings import Finding, Severity
from opd.preflight.reader import Reader, quoted
from opd.protocols import Needs

QUESTION, _ANSWER = "How much is 12345 and 678?", "It is 13023."
_THOUGHTS = "<think>\nLet me add.\n</think>\n\n"


def check_student_prompts(config: Config, needs: Needs, student: Reader) -> list[Finding]:
    """The student's own prompts: shown once, and what is odd about them."""
    ids = student.prompt(_question(config))
    if not student.has_template:
        what = f"{student.setting}: has no chat template"
        why = "the contents of a conversation are read one after the other, with nothing between them"
        remedy = f"set {student.section}.chat_template if it is to answer turns"
        plain = Finding("pair.no_template", "note", what, why, remedy)
        return [plain, *_shown(student, ids)]
    return [
        *_shown(student, ids),
        *_check_bos(student, ids),
        *_check_thinking_is_set(config, student),
        *_check_prefix(config, needs, student),
    ]


def check_teacher_prompt(config: Config, student: Reader, teacher: Reader, *, across: bool) -> list[Finding]:
    """Whether the teacher's own prompt for a question is the one that it is given.

    With one tokenizer it reads the student's rendering; `across`: its own, so that a difference is only worth knowing.
    """
    messages = _question(config)
    theirs = teacher.prompt(messages)
    if theirs is None:
        return _shown(teacher, theirs) if across else []
    findings = [*_shown(teacher, theirs), *_check_bos(teacher, theirs)] if across else []
    findings += _check_thinking_is_set(config, teacher) if across else []
    modes = [_thinking(config, reader) for reader in (student, teacher)]
    ours = student.prompt(messages)
    if ours is None:
        return findings
    if None not in modes and modes[0] != modes[1]:
        what = f"{teacher.setting}: thinking is {_on(modes[1])} for the teacher and {_on(modes[0])} for the student"
        remedy = "set model.student.thinking and model.teacher.thinking alike"
        shown = f"{what} ({_prompts(student, ours, teacher, theirs)})"
        why = "they answer in different manners, and the one is compared with the other"
        return [*findings, Finding("pair.thinking", "warning", shown, why, remedy)]
    texts = [reader.text(ids) for reader, ids in ((student, ours), (teacher, theirs))]
    if across and student.has_template and not teacher.has_template:
        what = f"{teacher.setting}: has no chat template, and the student has one"
        why = "the teacher reads a conversation as bare text, and does not answer as in a conversation"
        return [*findings, Finding("pair.template", "warning", what, why, "set model.teacher.chat_template")]
    if texts[0] == texts[1]:
        return findings
    if _is_bos_alone(ours, theirs, student, teacher):
        return [*findings, _difference("pair.bos", _bos_line(student, teacher, ours), across=across)]
    what = f"{teacher.setting}: its own template writes another prompt: {_prompts(student, ours, teacher, theirs)}"
    return [*findings, _difference("pair.template", what, across=across)]


def _question(config: Config) -> list[Message]:
    system = config.data.system_prompt
    opening: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": QUESTION}]


def _num_same(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _shown(reader: Reader, ids: list[int] | None) -> list[Finding]:
    if ids is None:
        what = f"{reader.setting}: its chat template refuses a user's question"
        return [
            Finding("pair.template", "warning", what, "rows of conversations will be refused", "change the template")
        ]
    return [Finding("pair.prompt", "note", f"{reader.setting}: {len(ids)} tokens: {quoted(reader.text(ids))}")]


def _difference(check: str, what: str, *, across: bool) -> Finding:
    if across:
        return Finding(check, "note", what, "each model reads the question in its own form")
    why = "the teacher reads the student's, and scores what it was not trained on"
    remedy = "set model.student.chat_template to a file with the teacher's, or choose models with one template"
    return Finding(check, "warning", what, why, remedy)


def _prompts(student: Reader, ours: list[int], teacher: Reader, theirs: list[int]) -> str:
    """Both rendered prompts around where they part, and the first tokens that differ."""
    texts = student.text(ours), teacher.text(theirs)
    at = _num_same(*texts)
    said = f"student {quoted(texts[0], at)} ({len(ours)} tokens), teacher {quoted(texts[1], at)} ({len(theirs)} tokens)"
    pairs = enumerate(zip_longest(ours, theirs))
    place, tokens = next(((k, pair) for k, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
    names = [
        "nothing" if token is None else reader.token(token)
        for reader, token in zip((student, teacher), tokens, strict=True)
    ]
    return f"{said}, first at token {place}: {names[0]} and {names[1]}"


def _is_bos_alone(ours: list[int], theirs: list[int], student: Reader, teacher: Reader) -> bool:
    """Whether the prompts differ by nothing but the BOS that one of them begins with."""
    bare = []
    for reader, ids in ((student, ours), (teacher, theirs)):
        bos = reader.tokenizer.bos_token_id
        bare.append(reader.text(ids[1:] if bos is not None and ids[:1] == [bos] else ids))
    return bare[0] == bare[1]


def _bos_line(student: Reader, teacher: Reader, ours: list[int]) -> str:
    begins = ours[:1] == [student.tokenizer.bos_token_id]
    who = "the student's does, and its own does not" if begins else "its own does, and the student's does not"
    bos = student.tokenizer.bos_token if begins else teacher.tokenizer.bos_token
    return f"{teacher.setting}: of the prompts that begin with the BOS {bos!r}, {who}"


def _check_bos(reader: Reader, ids: list[int] | None) -> list[Finding]:
    """A template brings its own BOS, or none; that the tokenizer adds one to plain text does not matter here."""
    bos, setting = reader.tokenizer.bos_token_id, reader.setting
    if ids is None or bos is None or not reader.has_template:
        return []
    if ids[:2] == [bos, bos]:
        what = f"{setting}: its chat template begins a prompt with two BOS ({reader.token(bos)})"
        return [Finding("pair.bos", "warning", what, "no model was trained on two", "leave one out of the template")]
    if not reader.adds_bos:
        return []
    if ids[:1] == [bos]:
        what = f"{setting}: template and tokenizer both bring the BOS ({reader.token(bos)})"
        return [
            Finding("pair.bos", "note", what, "rendered text is tokenized without the tokenizer's own, so there is one")
        ]
    what = f"{setting}: its tokenizer puts the BOS {reader.token(bos)} before plain text, its chat template does not"
    return [
        Finding("pair.bos", "note", what, "prompts begin without it", "write {{ bos_token }} at the template's head")
    ]


def _thinking(config: Config, reader: Reader) -> bool | None:
    """Whether the template asks for thoughts; None: it knows no such switch."""
    if reader.thinking is not None or not reader.has_template:
        return reader.thinking
    messages = _question(config)
    plain, *switched = [reader.rendered(messages, opens=True, **kw) for kw in ({}, *_SWITCH)]
    if switched[0] == switched[1] or plain not in switched:
        return None
    return plain == switched[0]


_SWITCH = ({"enable_thinking": True}, {"enable_thinking": False})


def _check_thinking_is_set(config: Config, reader: Reader) -> list[Finding]:
    mode = _thinking(config, reader)
    if reader.thinking is not None or mode is None:
        return []
    what = f"{reader.section}.thinking=None: {reader.path} thinks by its template, or not; it is {_on(mode)}"
    return [Finding("pair.thinking", "note", what, "", f"set {reader.section}.thinking to say which")]


def _on(mode: bool | None) -> str:
    return "on" if mode else "off"


def _check_prefix(config: Config, needs: Needs, student: Reader) -> list[Finding]:
    """Whether the beginning of a conversation stays as it was when more follows; rows where it does not are refused."""
    found = []
    cases: tuple[tuple[str, Severity], ...] = ((_ANSWER, "warning"), (_THOUGHTS + _ANSWER, "note"))
    for content, severity in cases:
        problem = _unstable(config, needs, student, content)
        if problem and not found:
            with_thoughts = " with <think> text" if content != _ANSWER else ""
            what = f"{student.setting}: its chat template changes what went before: {problem}{with_thoughts}"
            remedy = f"set {student.section}.chat_template=training, or a file that renders a turn always the same"
            why = "loss tokens would not be what was sampled, so such rows are refused"
            found.append(Finding("pair.prefix", severity, what, why, remedy))
    return found


def _unstable(config: Config, needs: Needs, student: Reader, content: str) -> str | None:
    """Where the rendering of a beginning is not the beginning of the whole's."""
    first = [*_question(config), {"role": "assistant", "content": content}]
    opened, once = student.rendered(first[:-1], opens=True), student.rendered(first)
    if opened is None or once is None:
        return None
    if needs.completions != "unused" and not once.startswith(opened):
        return f"the assistant's turn is opened with {quoted(opened, len(opened))} and shown otherwise"
    more = [*first, {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes."}]
    whole = student.rendered(more)
    if needs.turns != "all" or whole is None:
        return None
    same = _num_same(once, whole)
    if same < once.rfind(_ANSWER) + len(_ANSWER):
        return f"an answer reads {quoted(once, same)}, and {quoted(whole, same)} once more follows"
    return None
