"""Student and teacher as a pair: do they read and write the same?"""

from __future__ import annotations

from opd.config import Config
from opd.loading import Readers
from opd.preflight.coverage import SAMPLE, check_coverage, why_no_alignment
from opd.preflight.ends import check_ends, check_special_tokens, check_student_end
from opd.preflight.findings import Finding, errors_of
from opd.preflight.prompts import QUESTION, check_student_prompts, check_teacher_prompt
from opd.preflight.reader import STUDENT, Reader
from opd.protocols import Method


def check_pair(config: Config, method: Method, readers: Readers) -> list[Finding]:
    """Tokenizers, vocabularies, ends, templates and thinking mode of the run's models.

    A teacher that only measures the student is held to the same; what would spoil a training by it is a note then.
    """
    needs = method.needs
    student = Reader.of(STUDENT, readers, config)
    findings = [*check_student_end(student), *check_student_prompts(config, needs, student)]
    asked = {need.model for need in needs.asked(config.mode).values() if not need.is_student}
    for key in readers.others:
        teacher = Reader.of(key, readers, config)
        across = needs.alignment is not None and key == "model.teacher.path"
        differing = _differing(student, teacher)
        found = _check_teacher(config, method, student, teacher, differing, across=across)
        if key not in asked and not (key == "model.teacher.path" and "teacher" in asked):
            found = [_as_note(finding) for finding in found]
        findings += found
        findings.append(_verdict(student, teacher, differing, found))
    return findings


def _check_teacher(
    config: Config, method: Method, student: Reader, teacher: Reader, differing: list[str], *, across: bool
) -> list[Finding]:
    """All that is to be said of one teacher; `across`: it may have another tokenizer."""
    if differing and not across:
        return [_other_tokenizer(student, teacher, differing)]
    findings = check_teacher_prompt(config, student, teacher, across=across)
    if differing:
        note = f"{teacher.setting}: {_difference(student, teacher, differing)}"
        findings.append(Finding("pair.tokenizer", "note", note, "it reads the same text in its own tokens"))
        return [*findings, *check_coverage(method, student, teacher)]
    return [
        *findings,
        *_check_widths(student, teacher),
        *_check_segmentation(student, teacher),
        *check_ends(student, teacher),
        *check_special_tokens(student, teacher),
    ]


def _differing(student: Reader, teacher: Reader) -> list[str]:
    mine, theirs = student.vocabulary, teacher.vocabulary
    if mine == theirs:
        return []
    return sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))


def _other_tokenizer(student: Reader, teacher: Reader, differing: list[str]) -> Finding:
    return Finding(
        "pair.tokenizer",
        "error",
        f"{teacher.setting}: its tokenizer is not the student's: {_difference(student, teacher, differing)}",
        "one id would be two different tokens, and every score compares them",
        "choose a teacher of the student's family, or method=gold",
    )


def _difference(student: Reader, teacher: Reader, differing: list[str]) -> str:
    """How many tokens differ, an example, and what one side alone has added."""
    mine, theirs = student.vocabulary, teacher.vocabulary
    moved = [token for token in differing if token in mine and token in theirs]
    token = (moved or differing)[0]
    said = f"{len(differing):,} of {len(mine):,} and {len(theirs):,} tokens differ"
    ids = [f"id {ids[token]}" if token in ids else "none" for ids in (mine, theirs)]
    said += f", e.g. {token!r} is {ids[0]} for the student and {ids[1]} for the teacher"
    sides = (("student", student, theirs), ("teacher", teacher, mine))
    for name, reader, others in sides:
        if alone := sorted(reader.tokenizer.get_added_vocab().keys() - others.keys()):
            said += f"; added tokens of the {name} alone: {len(alone)} ({', '.join(map(repr, alone[:3]))})"
    return said


def _check_widths(student: Reader, teacher: Reader) -> list[Finding]:
    num_ids, shared = max(student.vocabulary.values()) + 1, min(student.width, teacher.width)
    sizes = f"embedding tables of {student.width:,} (student) and {teacher.width:,} (teacher) rows"
    if num_ids > shared:
        what = f"{STUDENT}={student.path}: its tokenizer has ids up to {num_ids - 1:,}, and {sizes}"
        why = "tokens that one of them cannot score would be compared"
        remedy = "choose models whose embedding tables cover the tokenizer"
        return [Finding("pair.width", "error", what, why, remedy)]
    if student.width == teacher.width:
        return []
    why = f"the tokenizer ends at id {num_ids - 1:,}, so the first {shared:,} columns of both are compared"
    return [Finding("pair.width", "note", f"{teacher.setting}: {sizes}", why)]


def _check_segmentation(student: Reader, teacher: Reader) -> list[Finding]:
    text = f"{SAMPLE}{QUESTION}"
    mine, theirs = (list(r.tokenizer(text, add_special_tokens=False)["input_ids"]) for r in (student, teacher))
    if mine == theirs:
        return []
    what = f"{teacher.setting}: the same tokens, but it cuts text otherwise ({len(theirs)} tokens of a sample, the "
    what += f"student's tokenizer {len(mine)})"
    why = "the teacher scores the student's cuts, which it was not trained on"
    return [Finding("pair.segmentation", "warning", what, why, "give both folders the same tokenizer files")]


def _as_note(finding: Finding) -> Finding:
    if finding.severity == "error":
        remedy = f"{finding.remedy}; or evaluation.divergence=false, as it only measures"
        return Finding(finding.check, finding.severity, finding.what, finding.why, remedy)
    return Finding(finding.check, "note", finding.what, f"it only measures the student: {finding.why}", finding.remedy)


def _verdict(student: Reader, teacher: Reader, differing: list[str], found: list[Finding]) -> Finding:
    """What this pair can be used for, in one sentence."""
    names = f"{teacher.path} as teacher of {student.path}"
    broken = [finding.check for finding in errors_of(found) if finding.check != "pair.tokenizer"]
    if not student.stops:
        verdict = f"do not: {names}: no completion can end without an eos token"
    elif broken:
        verdict = f"do not: {names}: {broken[0]} is an error"
    elif not differing:
        verdict = f"same-tokenizer methods: {names} has the same tokens, and gold is gkd then"
    elif reason := why_no_alignment(student, teacher):
        verdict = f"do not: {names}: the tokenizers differ, and {reason}"
    else:
        verdict = f"only gold: {names} has another tokenizer"
    return Finding("pair.verdict", "note", verdict)
