"""Ranks that call sharded models differently often: one that has nothing left to ask goes along until nobody has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from opd import distributed


@contextmanager
def in_step(*calls: tuple[Any, Callable[[], object]]) -> Iterator[None]:
    """Inside, a rank may call these models as often as it likes, or never; it is left by all ranks together.

    `calls`: each model, with what a rank does to take part in a call of it without asking anything. Before every
    forward the ranks tell each other whose it is. No other collective may happen inside, and ranks that call several
    models call them in the same order.
    """
    hooks = [
        model.register_forward_pre_hook(partial(_tell, number), prepend=True)  # before the hook that gathers
        for number, (model, _) in enumerate(calls, 1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while calls and (number := _agreed(0)):
        calls[number - 1][1]()


def _tell(number: int, *_: Any) -> None:
    if (agreed := _agreed(number)) != number:
        raise RuntimeError(f"a rank calls sharded model {agreed} where this one calls {number}: neither would end")


def _agreed(number: int) -> int:
    return int(distributed.maximum(torch.tensor(float(number))))
