"""Addressed randomness: every draw is a function of (seed, purpose, address), never of what was drawn before.

Evaluation therefore cannot disturb training, a resumed run draws what the uninterrupted one would have drawn, and a
rollout can be made again from its step and row alone, on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A counter-based generator (Philox) that belongs to one address, e.g. ("rollout", step, row, member)."""
    text = ":".join([str(seed), purpose, *map(str, address)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def coin(seed: int, purpose: str, *address: int) -> float:
    """One uniform number in [0, 1)."""
    return float(generator(seed, purpose, *address).random())


def permutation(size: int, seed: int, purpose: str, *address: int) -> np.ndarray:
    """A permutation of range(size)."""
    return generator(seed, purpose, *address).permutation(size)
