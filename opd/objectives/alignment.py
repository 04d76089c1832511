"""Which tokens of two tokenizations spell the same bytes, and how well two tokenizers fit each other. No tensors.

A token is known by the byte at which it ends in the completion's text. Ends come from the bytes that each id stands
for, never from decoding and encoding again: what a student sampled need not be how its tokenizer would write the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from opd.errors import ConfigError
from opd.protocols import Group

_REPLACEMENT = "\ufffd"
_UNDECODED = re.compile("[\udc80-\udcff]")  # what Python's surrogateescape makes of a byte that is no UTF-8
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_DIGITS = b"0123456789"


def align(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Group]:
    """Pairs of token ranges that end at the same byte; together they cover both sides in order, without gaps.

    Two pointers (TRL's GOLD, 2026): the token that ends earlier is passed, equal ends close a pair. What is left over
    is one last pair, of which one side may be empty or both may differ in text.
    """
    pairs: list[Group] = []
    a = b = c = d = 0
    while b < len(student_ends) and d < len(teacher_ends):
        student_end, teacher_end = student_ends[b], teacher_ends[d]
        b += student_end <= teacher_end
        d += teacher_end <= student_end
        if student_end == teacher_end:
            pairs.append((a, b, c, d))
            a, c = b, d
    if a < len(student_ends) or c < len(teacher_ends):
        pairs.append((a, len(student_ends), c, len(teacher_ends)))
    return pairs


def align_positions(num_student: int, num_teacher: int) -> list[Group]:
    """The k-th token with the k-th, whatever they spell; what the longer side has more is a last, one-sided pair."""
    shared = min(num_student, num_teacher)
    pairs: list[Group] = [(k, k + 1, k, k + 1) for k in range(shared)]
    if num_student != num_teacher:
        pairs.append((shared, num_student, shared, num_teacher))
    return pairs


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What each id adds to the text, as bytes: a part of a character too. Added tokens stand for their own name.

    Exact for byte-level BPE (GPT-2's alphabet) and for sentencepiece vocabularies with byte fallback, where ▁ is a
    space. Raises ConfigError for any other, whose tokens do not spell the text byte by byte.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = {part.get("type") for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        bytes_of = _alphabet_bytes
    elif "ByteFallback" in kinds:
        bytes_of = _fallback_bytes
    else:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ConfigError(
            f"method.extended=true: the tokenizer of {name} is neither byte-level nor has byte fallback, so its tokens "
            "have no places in the text; set method.extended=false"
        )
    added = tokenizer.get_added_vocab()
    return {
        number: token.encode() if token in added else bytes_of(token) for token, number in tokenizer.get_vocab().items()
    }


def spell(pieces: Sequence[bytes], *, truncated: bool) -> tuple[str, list[int]]:
    """The text that the pieces spell, and the byte of it (in UTF-8) at which each of them ends.

    A byte that belongs to no character becomes one U+FFFD. If the text is `truncated`, the pieces at its end that
    reach into an unfinished character are left out, and there are fewer ends than pieces.
    """
    data, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
    while truncated and (unfinished := _unfinished_bytes(data)):
        whole = len(data) - unfinished
        ends = [end for end in ends if end <= whole]
        data = data[: ends[-1] if ends else 0]
    text = data.decode(errors="surrogateescape")
    if not _UNDECODED.search(text):
        return text, ends
    place = [0]  # of each boundary of `data` in the repaired text
    for character in text:
        if _UNDECODED.match(character):
            place.append(place[-1] + len(_REPLACEMENT.encode()))
        else:
            place += range(place[-1] + 1, place[-1] + 1 + len(character.encode()))
    return _UNDECODED.sub(_REPLACEMENT, text), [place[end] for end in ends]


def encode(tokenizer: Any, text: str, pieces: Mapping[int, bytes]) -> tuple[list[int], list[int]]:
    """The text's ids without special tokens around it, and the byte of the text at which each ends.

    `pieces` are the tokenizer's token_bytes. Where it changes the text before it cuts it (NFC, a space in front), its
    tokens are placed by the characters it says they come from: the first parts of one end where it begins.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    spelled = [pieces[token] for token in ids]
    if b"".join(spelled) == text.encode():
        return ids, list(accumulate(map(len, spelled)))
    boundaries = [0, *accumulate(len(character.encode()) for character in text)]
    stops = [boundaries[stop] for _, stop in encoded["offset_mapping"]]
    ends, done = [], 0
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        done = done if stop == following else max(done, stop)
        ends.append(done)
    return ids, ends


def alignment_coverage(texts: Iterable[str], student_tokenizer: Any, teacher_tokenizer: Any) -> dict[str, float]:
    """How the bytes of these texts fall, and of them the digits: shares in pairs of one token, of several, in none.

    {"bytes", "one_to_one", "multi_token", "dropped", "digits", "digits_one_to_one", …}; "bytes" and "digits" are
    numbers. Digits stand apart because tokenizers that cut numbers differently leave them without a match, which costs
    arithmetic most: X-Token (arXiv 2605.21699) measured GSM8K 2.6 for GOLD across such a pair, and 12.9 for the same
    student and a weaker teacher with its own tokenizer.
    """
    student_pieces, teacher_pieces = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    found: Counter[str] = Counter()
    for text in texts:
        data = text.encode()
        found.update(bytes=len(data), digits=_num_digits(data))
        ends = encode(student_tokenizer, text, student_pieces)[1]
        for a, b, c, d in align(ends, encode(teacher_tokenizer, text, teacher_pieces)[1]):
            if a < b and c < d:
                name = "one_to_one" if b - a == d - c == 1 else "multi_token"
                shared = data[ends[a - 1] if a else 0 : ends[b - 1]]
                found.update({name: len(shared), f"digits_{name}": _num_digits(shared)})
    shares: dict[str, float] = {}
    for total, prefix in (("bytes", ""), ("digits", "digits_")):
        parts = {f"{prefix}{name}": found[f"{prefix}{name}"] for name in ("one_to_one", "multi_token")}
        parts[f"{prefix}dropped"] = found[total] - sum(parts.values())
        shares |= {total: found[total], **{name: part / max(found[total], 1) for name, part in parts.items()}}
    return shares


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: the printable bytes of Latin-1 are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _alphabet_bytes(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


def _fallback_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def _unfinished_bytes(data: bytes) -> int:
    """Bytes at the end that begin a character and do not finish it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


def _num_digits(data: bytes) -> int:
    return sum(byte in _DIGITS for byte in data)
