"""Who this process is among the ranks, and the sums they form. With one process a sum is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number in the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on each of them."""
    return _reduce(tensor, "sum")


def maximum(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all ranks, on each of them."""
    return _reduce(tensor, "max")


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on rank 0; an empty list on the others. All ranks have to call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def _reduce(tensor: Tensor, kind: str) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    reduced = tensor.clone()
    if dist.get_backend() == "nccl" and reduced.device.type == "cpu":
        reduced = reduced.to(torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(reduced, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)
    return reduced.to(tensor.device)


def everyones(value: T) -> list[T]:
    """Every rank's value, by rank, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def union(names: Iterable[str]) -> list[str]:
    """Every name that some rank has, in one order on all of them."""
    return sorted({name for part in everyones(list(names)) for name in part})
