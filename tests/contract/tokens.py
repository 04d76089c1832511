"""Two byte-level tokenizers of a few dozen tokens over one alphabet, which write the same text differently."""

from __future__ import annotations

from functools import cache
from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

STOPS = (3, 7, 11, 19, 23, 31, 43, 59)  # ids of the student's; many, so that rollouts end at ragged lengths
PAD = 0
_SPECIAL = ["<pad>", *(f"<stop{number}>" for number in STOPS)]
_ALPHABET = [*"0123456789", "+", "=", "Ġ", "Ċ", *"abcd"]  # Ġ and Ċ are the byte alphabet's space and line break


@cache
def student_tokenizer() -> PreTrainedTokenizerFast:
    """60 tokens: some pairs of digits are one."""
    return _build(60, [*product("0123456789", "05"), *product("abcd", "ab"), *product("+=", "123")])


@cache
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """76 tokens under other ids: other pairs, of digits, letters and signs."""
    return _build(
        76, [*product("0123456789", "579"), *product("dcba", "da"), *product("=+", "39ab"), *product("ab", "012")]
    )


def _build(size: int, pairs: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """As many of the pairs as there is room for; pad and the stop tokens lie at PAD and STOPS."""
    merges = pairs[: size - len(_SPECIAL) - len(_ALPHABET)]
    ordinary = iter([*_ALPHABET, *("".join(pair) for pair in merges)])
    special = dict(zip((PAD, *STOPS), _SPECIAL, strict=True))
    vocabulary = {special.get(number) or next(ordinary): number for number in range(size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=special[STOPS[0]],
        clean_up_tokenization_spaces=False,
    )
