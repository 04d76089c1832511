"""How student and teacher end an answer, and what their special tokens are for."""

from __future__ import annotations

from opd.preflight.findings import Finding
from opd.preflight.reader import STUDENT, Reader

_LEARN = "add it to eos_token_id in the student's generation_config.json"


def check_student_end(student: Reader) -> list[Finding]:
    """Whether rollouts stop where the student's own template ends a turn; and what fills a batch."""
    return [*_check_turn_end(student), *_check_pad(student)]


def check_ends(student: Reader, teacher: Reader) -> list[Finding]:
    """A teacher with the student's tokens ends its answers in some token: it must stop the student's rollouts too.

    What the student's own template ends a turn with is `check_student_end`'s to tell.
    """
    # What its template writes behind an answer comes first; a base's tokenizer may call another token its eos.
    end = teacher.turn_end if teacher.turn_end is not None else teacher.tokenizer.eos_token_id
    if end is None or end in student.stops or end == student.turn_end:
        return []
    return [
        Finding(
            "pair.end",
            "warning",
            f"{teacher.setting}: ends its answers with {teacher.token(end)}, the student with "
            f"{student.tokens(student.stops)}",
            "what the teacher calls the end, the student's rollouts go past, and they grow",
            f"{_LEARN}, or begin with a student that method=sft has taught to end",
        )
    ]


def check_special_tokens(student: Reader, teacher: Reader) -> list[Finding]:
    """Roles that the two give to different ids of one vocabulary."""
    roles = []
    for role in ("bos", "eos", "pad", "unk"):
        ours, theirs = (getattr(reader.tokenizer, f"{role}_token") for reader in (student, teacher))
        if ours != theirs:
            roles.append(f"{role} {ours!r} for the student and {theirs!r} for the teacher")
    mine, others = ({*reader.tokenizer.all_special_tokens} for reader in (student, teacher))
    alone = sorted(mine ^ others)
    if alone:
        roles.append(f"special for one of them alone: {', '.join(map(repr, alone[:4]))}")
    if not roles:
        return []
    why = "only the student's are used; the teacher reads the student's ids"
    return [Finding("pair.special_tokens", "note", f"{teacher.setting}: {'; '.join(roles)}", why)]


def _check_turn_end(student: Reader) -> list[Finding]:
    end = student.turn_end
    if end is None or end in student.stops:
        return []
    return [
        Finding(
            "pair.turn_end",
            "warning",
            f"{student.setting}: its chat template ends a turn with {student.token(end)}, which is none of its stop "
            f"tokens ({student.tokens(student.stops)})",
            "rollouts go on past the end of the answer, and grow",
            f"{_LEARN}, or make it the tokenizer's eos_token",
        )
    ]


def _check_pad(student: Reader) -> list[Finding]:
    tokenizer = student.tokenizer
    if tokenizer.pad_token_id is None:
        what = "no pad token; a stop token fills batches"
    elif tokenizer.pad_token_id in student.stops:
        what = f"pad is a stop token ({tokenizer.pad_token!r})"
    else:
        return []
    return [
        Finding("pair.pad", "note", f"{STUDENT}={student.path}: {what}", "masks come from lengths, so no end is lost")
    ]
