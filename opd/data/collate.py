"""Views laid out in one right-padded tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.protocols import Layout, TokenView


def lay_out(views: Sequence[TokenView], *, pad_id: int, device: torch.device | str = "cpu") -> Layout:
    """The views as one batch, padded on the right: absolute positions then need no position ids.

    The attention mask and the loss positions come from lengths; `pad_id` may be a token that also occurs in the text.
    """
    width = max((len(view.ids) for view in views), default=1)
    rest = [width - len(view.ids) for view in views]
    input_ids = torch.tensor([view.ids + [pad_id] * n for view, n in zip(views, rest, strict=True)], dtype=torch.long)
    loss_mask = torch.tensor([view.loss_mask + [False] * n for view, n in zip(views, rest, strict=True)])
    attention_mask = (torch.arange(width) < torch.tensor([[len(view.ids)] for view in views])).long()
    owner, position = loss_mask[:, 1:].nonzero(as_tuple=True)  # position t predicts token t+1
    return Layout(
        input_ids.to(device),
        attention_mask.to(device),
        (owner * width + position).to(device),
        input_ids[owner, position + 1].to(device),
        owner.to(device),
    )
