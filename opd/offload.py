"""A frozen model whose decoder layers stay in main memory; each is on the device while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opd.models import decoder_layers


def offload(model: Any, key: str, *, device: torch.device) -> None:
    """In place. Embeddings, head, last norm and what else is in no decoder layer lie on the device, and stay there.

    The layers' weights lie in this process's own main memory, for a GPU in pages that it can copy from by itself. `key`
    names the setting that asked for it. Raises ConfigError for a family that does not tell its layers.
    """
    layers = decoder_layers(model, key)
    moving = [[*layer.parameters(), *layer.buffers()] for layer in layers]
    known = {id(tensor) for tensors in moving for tensor in tensors}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in known:
            tensor.data = tensor.data.to(device)
    for layer, tensors in zip(layers, moving, strict=True):
        visit = _Visit(tensors, device)
        layer.register_forward_pre_hook(visit.arrive, prepend=True)
        layer.register_forward_hook(visit.leave, always_call=True)


class _Visit:
    """What a layer's forward does with its weights before and after."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._home = [tensor.data.pin_memory() if device.type == "cuda" else tensor.data for tensor in tensors]
        self.leave()

    def arrive(self, layer: nn.Module, arguments: Any) -> None:
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home.to(self._device, non_blocking=True, copy=True)

    def leave(self, *_: Any) -> None:
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home
