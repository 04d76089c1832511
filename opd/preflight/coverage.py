"""How well two tokenizers fit each other: what gold can compare."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.objectives.alignment import alignment_coverage
from opd.preflight.findings import Finding
from opd.preflight.reader import Reader
from opd.protocols import Method

SAMPLE = (
    "The quick brown fox jumps over the lazy dog; it isn't tired. Prices rose by 3.75% to $1,234.56 in 2024, "
    "12345 * 678 = 8369910.\n"
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # circle\n\n"
    "Le cœur déçu mais l'âme plutôt naïve. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. "
    "El pingüino Wenceslao hizo kilómetros. Съешь же ещё этих мягких французских булок. "
    "敏捷的棕色狐狸跳过了懒狗。 いろはにほへと ちりぬるを。 نص حكيم له سر قاطع. 키스의 고유조건은 입술끼리.\n"
)
_NUMBER = "12345"
_LEAST_TOGETHER = 0.5  # of the bytes, or of the digits, in groups of one token each
_MOST_DROPPED = 0.05  # of the bytes in no group at all


def why_no_alignment(student: Reader, teacher: Reader) -> str | None:
    """What stands against distilling across these tokenizers, if something does."""
    for name, reader in (("student", student), ("teacher", teacher)):
        if reader.tokenizer.eos_token_id is None:
            return f"the {name}'s has no eos token, so no answer ends in it"
    if student.has_template and not teacher.has_template:
        return "the teacher has no chat template, so it would read conversations as bare text"
    return None


def check_coverage(method: Method, student: Reader, teacher: Reader) -> list[Finding]:
    """Text and digits that both cut alike, on a fixed sample; and the token that the teacher ends an answer with."""
    alignment = method.needs.alignment
    assert alignment is not None
    findings = [] if alignment.skip_teacher_eos else _check_end(teacher)
    if not alignment.extended:
        return findings
    try:
        found = alignment_coverage([SAMPLE], student.tokenizer, teacher.tokenizer)
    except ConfigError as error:
        what, _, remedy = str(error).rpartition("; ")
        why = "tokens cannot be paired by the text that they spell"
        return [*findings, Finding("pair.alignment", "error", what, why, remedy)]
    return [*findings, *_shares(student, teacher, found)]


def _shares(student: Reader, teacher: Reader, found: dict[str, float]) -> list[Finding]:
    split = " and ".join(
        f"{'|'.join(reader.text([token]) for token in _ids(reader, _NUMBER))} ({name})"
        for name, reader in (("student", student), ("teacher", teacher))
    )
    said = f"{teacher.setting}: of a sample's bytes {found['one_to_one']:.0%} lie in groups of one token each, "
    said += f"{found['multi_token']:.0%} in groups of several, {found['dropped']:.0%} in none"
    is_low = found["one_to_one"] < _LEAST_TOGETHER or found["dropped"] > _MOST_DROPPED
    why = "a group of several is compared as one distribution, and what is in none teaches nothing"
    alike = found["digits_one_to_one"] >= _LEAST_TOGETHER
    digits = f"{teacher.setting}: {found['digits_one_to_one']:.0%} of a sample's digits are cut alike: {split}"
    costs = "numbers are compared by what follows them, which costs arithmetic most (docs/methods.md)"
    return [
        Finding("pair.alignment", "warning" if is_low else "note", said, why, _remedy() if is_low else ""),
        Finding(
            "pair.digits", "note" if alike else "warning", digits, "" if alike else costs, "" if alike else _remedy()
        ),
    ]


def _remedy() -> str:
    return "choose a teacher whose tokenizer cuts like the student's"


def _ids(reader: Reader, text: str) -> list[int]:
    return list(reader.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_end(teacher: Reader) -> list[Finding]:
    """The text view closes an answer with the tokenizer's eos, whatever the teacher's template closes a turn with."""
    end, eos = teacher.turn_end, teacher.tokenizer.eos_token_id
    if end is None or eos is None or end == eos:
        return []
    what = f"{teacher.setting}: its template ends a turn with {teacher.token(end)}, its tokenizer's eos is "
    what += f"{teacher.token(eos)}, which stands for the end in the comparison"
    why = "the teacher does not expect it there, and unlearns the student its end"
    return [Finding("pair.end", "warning", what, why, "set method.skip_teacher_eos=true, or the teacher's eos_token")]
