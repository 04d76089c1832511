"""The walk's own tokenizer: byte-level BPE, every number one token, trained in a tenth of a second.

Numbers as single tokens are what makes the task learnable in seconds by a model of 40,000 parameters; bytes
are not. Any text round-trips, since all 256 bytes are in the alphabet.
"""

from __future__ import annotations

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.data.walk_rules import REFERENCE_SEED, optimal_path, render_path, render_prompt, training_pairs
from opd.errors import ConfigError

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = [PAD, END, "<|user|>", "<|assistant|>", "<|system|>"]  # ids 0..4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def build_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer trained on one shortest walk per training pair; the same bytes every time.

    The default reaches 468 entries, all that the text has to merge, with every number of a prompt or an answer one
    token. 430 makes a tokenizer to distil across: 38 numbers are two tokens at the beginning of a text, none is after a
    space. No bos, no unk; end is not pad, so it can be a target.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size of the walk tokenizer must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(REFERENCE_SEED)
    texts = []
    for start, goal in training_pairs():
        answer = render_path(optimal_path(start, goal, rng))
        texts.append(f"<|user|>{render_prompt(start, goal)}{END}<|assistant|>{answer}{END}")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",  # prompts are continued at their right end
        clean_up_tokenization_spaces=False,
    )
