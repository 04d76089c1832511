"""One rank of a run: in this process, alone or among others that have joined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from opd import distributed, pipeline
from opd.artifacts.console import note
from opd.config import Config, Hardware
from opd.errors import OpdError, RunError, is_out_of_memory
from opd.memory_advice import advice
from opd.tokenizers import first_line

# All ranks wait while rank 0 writes a checkpoint or scores the answers of lm-eval; torch would give up after 10 minutes
# on NCCL and 30 on gloo. A rank that died is noticed without it.
PATIENCE = timedelta(hours=2)


def run(config: Config) -> None:
    """The run, or this rank's part of it. Raises RunError with what to change where memory is short."""
    try:
        pipeline.run(config)
    except KeyboardInterrupt:
        note("interrupted")
        raise
    except OpdError as error:
        note(str(error))
        raise
    except Exception as error:
        note(f"{type(error).__name__}: {error}")
        if not is_out_of_memory(error):
            raise
        who = "" if distributed.world_size() == 1 else f"rank {distributed.rank()}: "
        raise RunError(f"{who}{first_line(error)}\n{advice(config)}") from error


@contextmanager
def joined(hardware: Hardware, store: dist.Store) -> Iterator[None]:
    """The body is one of the ranks that meet at the store, $RANK of $WORLD_SIZE. Raises RunError on a missing GPU.

    A group of gloo's is left before Python ends, which aborts while a thread of it still holds a tensor; but not after
    an error, when others may be waiting for this rank, and leaving would wait for them, as NCCL's does always.
    """
    local = distributed.local_rank()
    if hardware.device == "cuda":  # or every rank would begin on the first one
        if local >= torch.cuda.device_count():
            raise RunError(
                f"hardware={hardware.name}: rank {distributed.rank()} wants GPU {local}, and its machine shows "
                f"{torch.cuda.device_count()}; ask for hardware.processes_per_node={hardware.processes_per_node} GPUs"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if hardware.device == "cuda" else "gloo",
        store=store,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        timeout=PATIENCE,
    )
    try:
        yield
    except SystemExit:  # interrupted, as the others are, sooner or later
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
