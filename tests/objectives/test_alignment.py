"""Groups of tokens, the bytes of ids, and how two tokenizers fit each other. Expected values are written out by hand."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.data.walk_tokenizer import build_tokenizer
from opd.errors import ConfigError
from opd.objectives.alignment import align, align_positions, alignment_coverage, encode, spell, token_bytes


def byte_level(*merges, special=(), normalizer=None):
    """A byte-level BPE with these merges and no others, so that what it makes of a text can be said beforehand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback():
    """Sentencepiece's form: ▁ for a space, and <0x..> for bytes that no token holds."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a"]
    model = models.BPE({token: number for number, token in enumerate(tokens)}, [("▁", "a")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@st.composite
def segmentations(draw):
    """Two ways to cut one text into tokens; either may end in a token of no width."""
    size = draw(st.integers(0, 25))
    sides = []
    for _ in range(2):
        inner = sorted(draw(st.sets(st.integers(1, max(size - 1, 1))))) if size > 1 else []
        sides.append([*inner, *([size] if size else []), *([size] if draw(st.booleans()) else [])])
    return sides


@settings(deadline=None)
@given(segmentations())
def test_groups_cover_each_side_in_order_without_gaps(sides):
    student, teacher = sides
    groups = align(student, teacher)
    assert [token for a, b, _, _ in groups for token in range(a, b)] == list(range(len(student)))
    assert [token for _, _, c, d in groups for token in range(c, d)] == list(range(len(teacher)))


@settings(deadline=None)
@given(segmentations())
def test_groups_of_one_text_end_at_the_same_byte_and_cannot_be_cut_further(sides):
    student, teacher = sides
    for a, b, c, d in align(student, teacher):
        if a < b and c < d:
            assert student[b - 1] == teacher[d - 1]
            assert not set(student[a : b - 1]) & set(teacher[c : d - 1])


@given(st.lists(st.integers(1, 9)))
def test_equal_segmentations_give_groups_of_one_token(lengths):
    ends = list(accumulate(lengths))
    assert align(ends, ends) == [(k, k + 1, k, k + 1) for k in range(len(ends))]


def test_positions_pair_one_to_one_and_the_rest_is_one_sided():
    assert align_positions(2, 4) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 2, 2, 4)]
    assert align_positions(1, 1) == [(0, 1, 0, 1)]
    assert align_positions(0, 0) == []


@settings(deadline=None)
@given(st.text())
def test_ids_of_a_byte_level_tokenizer_spell_the_text_they_were_made_of(text):
    tokenizer = walk_tokenizer()
    pieces = token_bytes(tokenizer)
    ids, ends = encode(tokenizer, text, pieces)
    assert b"".join(pieces[token] for token in ids) == text.encode()
    assert ends == list(accumulate(len(pieces[token]) for token in ids))


_WALK = []


def walk_tokenizer():
    if not _WALK:
        _WALK.append(build_tokenizer(430))
    return _WALK[0]


def test_an_added_token_stands_for_its_name():
    tokenizer = byte_level(special=["<é>"])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("<é>")] == "<é>".encode()


def test_byte_fallback_spells_spaces_and_parts_of_characters():
    tokenizer = byte_fallback()
    pieces = token_bytes(tokenizer)
    ids, ends = encode(tokenizer, "b aé", pieces)
    assert tokenizer.convert_ids_to_tokens(ids) == ["b", "▁a", "<0xC3>", "<0xA9>"]
    assert [pieces[token] for token in ids] == [b"b", b" a", b"\xc3", b"\xa9"]
    assert ends == [1, 3, 4, 5]


def test_a_tokenizer_that_does_not_spell_bytes_is_refused_with_the_remedy():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"^method\.extended=true: .* set method\.extended=false$"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@settings(deadline=None)
@given(st.text(), st.data())
def test_a_truncated_text_is_cut_before_the_token_that_begins_what_it_does_not_finish(text, data):
    whole = text.encode()
    pieces = cut_somewhere(data, whole[: data.draw(st.integers(0, len(whole)))])
    spelled, ends = spell(pieces, truncated=True)
    assert spelled.encode() == b"".join(pieces[: len(ends)])
    assert ends == list(accumulate(map(len, pieces[: len(ends)])))
    if len(ends) < len(pieces):  # no more than needed: with the next token in it, it is no text
        with pytest.raises(UnicodeDecodeError):
            b"".join(pieces[: len(ends) + 1]).decode()


def cut_somewhere(data, whole):
    places = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)))
    bounds = [0, *places, len(whole)]
    return [whole[a:b] for a, b in pairwise(bounds) if a < b]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4), max_size=8), st.booleans())
def test_any_bytes_give_a_text_and_ends_within_it(pieces, truncated):
    text, ends = spell(pieces, truncated=truncated)
    size = len(text.encode())
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == size
    assert truncated or len(ends) == len(pieces)


def test_a_byte_of_no_character_becomes_the_replacement_character():
    assert spell([b"a\xff", b"b", b"\xc3"], truncated=False) == ("a\ufffdb\ufffd", [4, 5, 8])
    assert spell([b"a\xff", b"b", b"\xc3"], truncated=True) == ("a\ufffdb", [4, 5])


def test_a_character_in_two_tokens_ends_in_the_second():
    assert spell([b"\xc3", b"\xa9!"], truncated=True) == ("é!", [1, 3])


def test_a_normalized_text_is_placed_by_whole_characters():
    tokenizer = byte_level(normalizer=normalizers.NFC())
    text = "x\u212by"  # the Ångström sign has three bytes; the tokenizer reads the two of the letter Å
    ids, ends = encode(tokenizer, text, token_bytes(tokenizer))
    assert (len(ids), ends) == (4, [1, 1, 4, 5])


def test_coverage_counts_bytes_and_digits_of_each_sort_of_pair():
    numbers, digits = byte_level(("1", "2"), ("a", "b")), byte_level(("a", "b"))
    coverage = alignment_coverage(["ab12", "3"], numbers, digits)
    assert coverage == {
        "bytes": 5,
        "one_to_one": pytest.approx(3 / 5),
        "multi_token": pytest.approx(2 / 5),
        "dropped": 0,
        "digits": 3,
        "digits_one_to_one": pytest.approx(1 / 3),
        "digits_multi_token": pytest.approx(2 / 3),
        "digits_dropped": 0,
    }


def test_a_tokenizer_fits_itself_and_no_text_is_no_error():
    tokenizer = byte_level(("1", "2"))
    assert alignment_coverage(["a 12 é"], tokenizer, tokenizer)["one_to_one"] == 1
    assert alignment_coverage([], tokenizer, tokenizer)["bytes"] == 0
