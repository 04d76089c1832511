"""What a teacher with another tokenizer reads of a completion, and which of its tokens say what."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.data.walk_tokenizer import END, build_tokenizer
from opd.errors import ConfigError
from opd.objectives.alignment import token_bytes
from opd.sources.text_views import TextViews

PROMPT = [2, 3]  # two tokens of the teacher's, whatever they are


@cache
def tokenizers():
    """The student's, which has some numbers in pieces, and the teacher's."""
    return build_tokenizer(430), build_tokenizer(512)


def stop(tokenizer):
    return tokenizer.convert_tokens_to_ids(END)


def views(extended=True, skip_student_eos=False, skip_teacher_eos=False, student=None):
    mine, theirs = tokenizers()
    mine = student or mine
    return TextViews(mine, theirs, frozenset({stop(mine)}), stop(theirs), extended, skip_student_eos, skip_teacher_eos)


def read(made, ids, finished=True, mask=None):
    return made.view(PROMPT, ids, mask or [True] * len(ids), finished)


def student_ids(text):
    return list(tokenizers()[0](text, add_special_tokens=False)["input_ids"])


def teacher_ids(text):
    return list(tokenizers()[1](text, add_special_tokens=False)["input_ids"])


def of_bytes(data):
    """The student's ids for single bytes: no tokenizer would write a text so, and a model can."""
    single = {piece: token for token, piece in sorted(token_bytes(tokenizers()[0]).items(), reverse=True)}
    return [single[bytes([byte])] for byte in data]


def unmerged_number():
    """An answer that begins with a number in two pieces for the student and in one for the teacher."""
    return next(str(n) for n in range(10, 100) if len(student_ids(str(n))) == 2 and len(teacher_ids(str(n))) == 1)


def test_the_teacher_reads_its_prompt_the_text_in_its_own_ids_and_its_stop_token():
    text = f"{unmerged_number()} 16 32"
    view, _ = read(views(), [*student_ids(text), stop(tokenizers()[0])])
    assert view.ids == [*PROMPT, *teacher_ids(text), stop(tokenizers()[1])]
    assert view.loss_mask == [False, False] + [True] * (len(view.ids) - 2)


def test_a_number_in_two_pieces_meets_the_whole_number():
    text = f"{unmerged_number()} 16"
    _, groups = read(views(), [*student_ids(text), stop(tokenizers()[0])])
    assert groups == [(0, 2, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3)]  # the number, the next one, the stop token


def test_a_truncated_rollout_gives_the_teacher_no_stop_token():
    view, groups = read(views(), student_ids("16 32"), finished=False)
    assert view.ids == [*PROMPT, *teacher_ids("16 32")]
    assert groups[-1][1] == len(student_ids("16 32"))


@pytest.mark.parametrize("extended", [True, False])
def test_skipping_leaves_out_a_real_stop_token_and_nothing_else(extended):
    ids = student_ids("16 32")
    made = views(extended, skip_student_eos=True, skip_teacher_eos=True)
    stopped, cut = read(made, [*ids, stop(tokenizers()[0])]), read(made, ids, finished=False)
    assert stopped[1] == cut[1]
    assert stopped[1][-1][1] == len(ids)
    assert stopped[0].ids == [*cut[0].ids, stop(tokenizers()[1])]
    assert stopped[0].loss_mask[-1]


def test_a_stop_token_against_none_is_a_one_sided_pair():
    ids = student_ids("16")
    _, groups = read(views(skip_teacher_eos=True), [*ids, stop(tokenizers()[0])])
    assert groups[-1] == (len(ids), len(ids) + 1, 1, 1)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=24), st.booleans())
@example(b"\xe2\x82", False)
@example(b"\xe2\x82", True)
@example(b"a\xffb", True)
def test_any_bytes_are_read_and_every_token_is_accounted_for(data, finished):
    student, teacher = tokenizers()
    ids = of_bytes(data) + [stop(student)] * finished
    view, groups = read(views(), ids, finished=finished)
    sides = [(0, 0, 0, 0), *groups, (len(ids), len(ids), len(view.ids) - 2, len(view.ids) - 2)]
    assert all(before[1] == after[0] and before[3] == after[2] for before, after in pairwise(sides))
    if finished:  # nothing is lost but bytes that are no character
        assert teacher.decode(view.ids[2:-1]) == "".join(
            "\ufffd" if "\udc80" <= c <= "\udcff" else c for c in data.decode(errors="surrogateescape")
        )


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12))
def test_ids_that_no_tokenizer_would_write_are_compared_byte_by_byte(text):
    student, teacher = tokenizers()
    pieces = token_bytes(student), token_bytes(teacher)
    ids = [*of_bytes(text.encode()), stop(student)]
    view, groups = read(views(), ids)
    assert view.ids[2:-1] == teacher_ids(text)
    for a, b, c, d in groups[:-1]:
        assert b"".join(pieces[0][token] for token in ids[a:b]) == b"".join(
            pieces[1][token] for token in view.ids[2:][c:d]
        )


def test_the_teacher_does_not_read_a_character_that_was_cut_off():
    ids = of_bytes("aé€".encode()[:-1])
    view, groups = read(views(), ids, finished=False)
    assert view.ids == [*PROMPT, *teacher_ids("aé")]
    assert groups[-1] == (3, 5, len(view.ids) - 2, len(view.ids) - 2)  # two of three bytes of €, and nothing


def test_a_special_token_in_the_middle_is_read_by_its_name():
    student, _ = tokenizers()
    middle = student.convert_tokens_to_ids("<|user|>")
    ids = [*student_ids("16"), middle, *student_ids("32"), stop(student)]
    view, _ = read(views(), ids)
    assert view.ids[2:-1] == teacher_ids("16<|user|>32")


def test_positions_pair_first_with_first_and_count_what_is_left():
    text = unmerged_number()
    _, groups = read(views(extended=False), student_ids(text), finished=False)
    assert groups == [(0, 1, 0, 1), (1, 2, 1, 1)]


def test_pairs_are_counted_in_loss_tokens_and_lose_a_side_where_a_token_is_none():
    ids = student_ids(" 16 32 64")
    assert len(ids) == len(teacher_ids(" 16 32 64")) == 3
    _, groups = read(views(), ids, finished=False, mask=[True, False, True])
    assert groups == [(0, 1, 0, 1), (1, 1, 1, 1), (1, 2, 2, 3)]


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("empty", ["student", "teacher"])
def test_a_first_token_that_nothing_predicts_is_compared_with_nothing(extended, empty):
    ids = student_ids(" 16 32")
    assert len(ids) == len(teacher_ids(" 16 32")) == 2
    _, groups = views(extended).view(
        [] if empty == "teacher" else PROMPT, ids, [True] * 2, False, student_prompt_is_empty=empty == "student"
    )
    two_sided = [group for group in groups if group[0] < group[1] and group[2] < group[3]]
    assert two_sided == [(0, 1, 1, 2) if empty == "student" else (1, 2, 0, 1)]


def test_a_tokenizer_without_bytes_is_refused_only_where_bytes_are_compared():
    vocabulary = {"[UNK]": 0, "16": 1, "32": 2, END: 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    student = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ConfigError, match=r"set method\.extended=false$"):
        views(student=student)
    view, _ = read(views(extended=False, student=student), [1, 2, 3])
    assert view.ids == [*PROMPT, *teacher_ids("16 32"), stop(tokenizers()[1])]
