"""What a teacher with another tokenizer reads: the same text in its own tokens, and which of them say what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from opd.objectives.alignment import align, align_positions, encode, spell, token_bytes
from opd.protocols import Group, TokenView


class TextViews:
    """Turns the student's completions into the teacher's tokens.

    `extended`: tokens are paired by the bytes they spell; false: by position, for tokenizers without bytes.
    `skip_student_eos`, `skip_teacher_eos`: that side's stop token is left out of the comparison. Raises ConfigError for
    a tokenizer that `extended` cannot read.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        stop_ids: frozenset[int],
        teacher_stop_id: int,
        extended: bool,
        skip_student_eos: bool,
        skip_teacher_eos: bool,
    ) -> None:
        self._student, self._teacher = student_tokenizer, teacher_tokenizer
        self._stop_ids, self._teacher_stop_id = stop_ids, teacher_stop_id
        self._skip_student, self._skip_teacher = skip_student_eos, skip_teacher_eos
        self._bytes = (token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)) if extended else None

    def view(
        self,
        teacher_prompt_ids: list[int],
        completion_ids: list[int],
        completion_mask: list[bool],
        finished: bool,
        *,
        student_prompt_is_empty: bool = False,
    ) -> tuple[TokenView, list[Group]]:
        """The teacher's prompt, the text in its tokens, its stop token if the student wrote one; and the pairs.

        Pairs count loss tokens, and cover both sides in order. One with an empty side has nothing to be compared with:
        it is kept so that it can be counted. That befalls tokens that reach into an unfinished character at the end of
        a truncated rollout, which the teacher does not read either; tokens that one side has more; and those at
        position 0 or outside the mask, with what they are paired with. A stop token in the middle is text like any
        other token's name.
        """
        stopped = finished and bool(completion_ids) and completion_ids[-1] in self._stop_ids
        body = completion_ids[:-1] if stopped else completion_ids
        student_stops, teacher_stops = int(stopped and not self._skip_student), int(stopped and not self._skip_teacher)
        if self._bytes is None:
            text = self._student.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            teacher_ids = list(self._teacher(text, add_special_tokens=False, verbose=False)["input_ids"])
            pairs = align_positions(len(body) + student_stops, len(teacher_ids) + teacher_stops)
        else:
            student_bytes, teacher_bytes = self._bytes
            # An id past the tokenizer's end, from a padded embedding table, spells nothing.
            pieces = [student_bytes.get(token, b"") for token in body]
            text, student_ends = spell(pieces, truncated=not stopped)
            teacher_ids, teacher_ends = encode(self._teacher, text, teacher_bytes)
            num_read, size = len(student_ends), len(text.encode())
            pairs = align(student_ends + [size] * student_stops, teacher_ends + [size] * teacher_stops)
            if num_read < len(body):
                pairs.append((num_read, len(body), len(teacher_ids), len(teacher_ids)))
        teacher_ids += [self._teacher_stop_id] * stopped
        view = TokenView(
            teacher_prompt_ids + teacher_ids, [False] * len(teacher_prompt_ids) + [True] * len(teacher_ids)
        )
        # Nothing predicts position 0.
        student_is_loss = [kept and (k > 0 or not student_prompt_is_empty) for k, kept in enumerate(completion_mask)]
        teacher_is_loss = [k > 0 or bool(teacher_prompt_ids) for k in range(len(teacher_ids))]
        return view, _in_loss_tokens(pairs, student_is_loss, teacher_is_loss)

    def same_text(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> bool:
        """Whether these tokens spell the same, stop tokens at the end apart.

        True where bytes are not known, or spell no text: the teacher reads replacement characters in their place.
        """
        if self._bytes is None:
            return True
        sides = list(
            zip(self._bytes, (student_ids, teacher_ids), (self._stop_ids, {self._teacher_stop_id}), strict=True)
        )
        whole = [b"".join(known.get(token, b"") for token in ids) for known, ids, _ in sides]
        ended = [b"".join(known.get(token, b"") for token in ids if token not in stops) for known, ids, stops in sides]
        # A stop token in the middle is text like any other token's name.
        return whole[0] == whole[1] or ended[0] == ended[1] or not _is_text(ended[0])


def _is_text(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


def _in_loss_tokens(
    pairs: Sequence[Group], student_is_loss: Sequence[bool], teacher_is_loss: Sequence[bool]
) -> list[Group]:
    """The pairs in numbers of loss tokens. One that holds other tokens too loses its teacher's side."""
    student = [0, *accumulate(student_is_loss)]
    teacher = [0, *accumulate(teacher_is_loss)]
    counted = []
    for a, b, c, d in pairs:
        group = (student[a], student[b], teacher[c], teacher[d])
        whole = group[1] - group[0] == b - a and group[3] - group[2] == d - c
        counted.append(group if whole else (*group[:3], group[2]))
    return counted
