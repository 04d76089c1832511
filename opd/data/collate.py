"""Views laid out in one tensor, a row each or packed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from opd.protocols import Layout, TokenView


def lay_out(
    views: Sequence[TokenView],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    at_labels: bool = False,
    packed: bool = False,
) -> Layout:
    """The views as one batch, padded on the right: absolute positions then need no position ids.

    Attention and the loss positions come from lengths; `pad_id` may be a token that also occurs in the text.
    `at_labels`: `predictors` are the positions of the loss tokens themselves, not those before them. `packed`: rows as
    long as the longest view, filled with as many views as fit; what is computed for a view stays the same.
    """
    lengths = [len(view.ids) for view in views]
    width = max(lengths, default=1)
    places = _best_fit(lengths, width) if packed else [(row, 0) for row in range(len(views))]
    num_rows = 1 + max((row for row, _ in places), default=-1)
    input_ids = torch.full((num_rows, width), pad_id)
    used = torch.zeros(num_rows, width, dtype=torch.long)  # a fill token is a view of its own: position 0
    for view, (row, first) in zip(views, places, strict=True):
        span = slice(first, first + len(view.ids))
        input_ids[row, span] = torch.tensor(view.ids, dtype=torch.long)
        used[row, span] = torch.arange(len(view.ids)) if packed else 1
    owner, position = _loss_positions(views)
    start = torch.tensor([row * width + first for row, first in places], dtype=torch.long)
    label = start[owner] + position
    return Layout(
        input_ids.to(device),
        None if packed else used.to(device),
        used.to(device) if packed else None,
        (label if at_labels else label - 1).to(device),
        input_ids.flatten()[label].to(device),
        owner.to(device),
    )


def _loss_positions(views: Sequence[TokenView]) -> tuple[torch.Tensor, torch.Tensor]:
    """(view, position in it) of every loss token; nothing predicts token 0."""
    pairs = [(k, t) for k, view in enumerate(views) for t, counted in enumerate(view.loss_mask) if counted and t]
    owner, position = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    return owner, position


def _best_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, first position) of each view: the longest first, each into the fullest row that still has room for it."""
    places, rooms, num_rows = [(0, 0)] * len(lengths), [], 0
    for view in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        fitting = bisect_left(rooms, (lengths[view], -1))
        room, row = rooms.pop(fitting) if fitting < len(rooms) else (width, num_rows)
        num_rows = max(num_rows, row + 1)
        places[view] = (row, width - room)
        insort(rooms, (room - lengths[view], row))
    return places
