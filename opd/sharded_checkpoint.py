"""What only a rank itself can save of a student in shards (FSDP2): its part of trained weights and optimizer states.

It belongs to this number of ranks. The checkpoint also holds the model as transformers saves it, for everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd import distributed
from opd.sharding import local


def save_shards(folder: Path, model: Any, optimizer: Any) -> None:
    """Write this rank's file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()
    states = {number: {k: _plain(v) for k, v in of.items()} for number, of in state["state"].items()}
    weights = {name: local(parameter).detach() for name, parameter in _trained(model).items()}
    torch.save({"weights": weights, "optimizer": {**state, "state": states}}, folder / _file())


def load_weights(folder: Path, model: Any) -> None:
    """Put this rank's part of the trained weights in its place."""
    saved = torch.load(folder / _file(), weights_only=True)["weights"]
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            local(parameter).copy_(saved[name])


def load_optimizer(folder: Path, optimizer: Any) -> None:
    """Give the optimizer its states back."""
    state = torch.load(folder / _file(), weights_only=True)["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, of in state["state"].items():
        state["state"][number] = {k: _as_shard(v, parameters[number]) for k, v in of.items()}
    optimizer.load_state_dict(state)


def _as_shard(value: Any, parameter: Tensor) -> Any:
    """A state that is as large as the parameter, sharded as it is; a step count is left alone."""
    if not isinstance(value, Tensor) or not value.dim() or not isinstance(parameter, DTensor):
        return value
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    part = value.to(local(parameter).device)
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def _plain(value: Any) -> Any:
    return local(value) if isinstance(value, Tensor) else value


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _file() -> str:
    return f"shards-{distributed.rank()}.pt"
