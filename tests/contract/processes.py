"""Two ranks that go through cases one after the other, in one pair of processes; a single process is asked the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from contract.command import FORKS

RANKS = 2
Case = Callable[[int, Path], Any]
"""(number of processes, folder) -> what there is to compare."""


Name = TypeVar("Name", bound=Hashable)


def on_two_ranks(cases: Mapping[Name, Case], folder: Path) -> dict[Name, list[Any]]:
    """{case: what each rank tells}."""
    processes = [FORKS.Process(target=_rank, args=(rank, str(folder), cases), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
        assert process.exitcode == 0, "a rank failed, or waits for the other; its traceback stands above"
    told = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [part[name] for part in told] for name in cases}


def _rank(rank: int, folder: str, cases: Mapping[Hashable, Case]) -> None:
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # accelerate asks; the ranks meet in a file
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    told = {name: case(RANKS, Path(folder)) for name, case in cases.items()}
    torch.save(told, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()
