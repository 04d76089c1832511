"""One command -> its ranks, on one machine or many.

    one process                      in place
    several on this machine          started and watched by torch elastic (opd.ranks)
    several machines, under Slurm    srun starts this command once on each: one leads, each starts its own ranks
    torchrun, accelerate launch      the first rank's process leads; each of them starts its one rank

`together` wraps a whole command: on the leading process it runs, the others follow (opd.together). `launch` runs one
config, of which a command may have several.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import interruption
from opd.artifacts.folders import make_folder
from opd.artifacts.run_folder import RANK_LOGS, RunFolder
from opd.config import Config, parse
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.together import Leader, Place, follow, take_place
from opd.together import is_follower as is_follower  # beside `together`, for what writes before the command begins

if TYPE_CHECKING:
    from opd.failures import Outcome

_leader: Leader | None = None  # of the command that runs now
_numbers = itertools.count(1)


def together(command: Callable[[], int]) -> int:
    """The exit code of the command, which the leading process runs; of the others, which follow it, 0.

    srun and torchrun end the rest when one process does not end with 0, and that would cut the leader short.
    """
    global _leader
    place = take_place()
    if place is None:
        return command()
    if place.number > 0:
        with interruption.handled(), interruption.deferred():  # the leader decides; ranks hear signals themselves
            follow(place, lambda order: _follow_part(place, order))
        return 0
    _leader = Leader(place)
    try:
        return command()
    finally:
        _leader.dismiss()
        _leader = None


def launch(config: Config) -> None:
    """Run the config on the processes that its hardware asks for."""
    interruption.leave_if_requested()
    RunFolder(config)  # refuse a folder that cannot be used before anything is loaded or trained for it
    check_place(config)
    from opd.failures import Outcome, conclude

    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{next(_numbers)}"
    logs = Path(config.run.dir).resolve() / RANK_LOGS / name
    if _leader is not None or config.hardware.world_size > 1:
        make_folder(logs, key=f"run.dir={config.run.dir}")
    if config.hardware.world_size == 1 or config.is_embedded:
        from opd import pipeline  # seconds, and memory that the ranks could use

        config = pipeline.prepare(config)
    else:
        from opd.artifacts.console import start_logging

        start_logging()
    if _leader is not None:
        order = {"config": config.model_dump(mode="json"), "logs": str(logs), "launch": name}
        _leader.begin(order)
        own = _run_part(_leader.place, config, order)
        conclude(map(Outcome.loaded, _leader.hear(name, own.dumped(), is_good=own.is_good)))
    elif config.hardware.world_size == 1:
        from opd import rank

        rank.run(config)
    else:
        from opd.ranks import Node, run_ranks

        conclude([run_ranks(config, logs, name, Node())])


def check_place(config: Config) -> None:
    """Refuse, with ConfigError, what this machine does not have, or those who started this process did not ask for."""
    _check_processes(config)
    _check_device(config)


def _check_processes(config: Config) -> None:
    """Whether those who started this process, if anybody did, started as many as the config wants."""
    hardware = config.hardware
    wanted = f"hardware={hardware.name}: {hardware.nodes} x {hardware.processes_per_node} processes"
    if _leader is None:
        if hardware.nodes > 1:
            raise ConfigError(
                f"hardware.nodes={hardware.nodes}: nobody started this command on the other machines; use "
                "hydra/launcher=slurm, or in a job of Slurm's: srun --ntasks-per-node=1 python -m opd …"
            )
        return
    place = _leader.place
    if place.kind == "nodes" and place.count != hardware.nodes:
        raise ConfigError(
            f"{wanted}, and srun started this command {place.count} times; start it once on each machine, which starts "
            f"its ranks itself: srun --nodes={hardware.nodes} --ntasks-per-node=1"
        )
    if place.kind == "ranks":
        if place.count != hardware.world_size:
            raise ConfigError(
                f"{wanted}, and torchrun or accelerate launch started {place.count}; start {hardware.world_size} "
                f"there, or set hardware.processes_per_node={place.count // hardware.nodes or 1}, or leave it out: "
                "python -m opd starts its ranks itself"
            )
        _check_accelerate(config, place.told)


def _check_accelerate(config: Config, told: dict[str, str]) -> None:
    """What accelerate launch was told of sharding and precision is said by hardware here: refused where it differs."""
    hardware, wishes = config.hardware, {name: value.lower() for name, value in told.items()}
    stage = wishes.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    zero = hardware.sharding.removeprefix("zero") if hardware.sharding.startswith("zero") else None
    if wishes.get("ACCELERATE_USE_DEEPSPEED") == "true" and (zero is None or stage not in ("", zero)):
        problem = f"hardware.sharding={hardware.sharding}: accelerate launch was told to use DeepSpeed"
        remedy = f"zero{stage or 2}, or leave DeepSpeed out there"
    elif wishes.get("ACCELERATE_USE_FSDP") == "true" and hardware.sharding != "fsdp2":
        problem = f"hardware.sharding={hardware.sharding}: accelerate launch was told to use FSDP"
        remedy = "fsdp2, or leave FSDP out there"
    elif (precision := wishes.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", hardware.precision):
        problem = f"hardware.precision={hardware.precision}: accelerate launch was told {precision}"
        remedy = f"{precision}, or leave --mixed_precision out there"
    else:
        return
    raise ConfigError(f"{problem}; set it to {remedy}")


def _check_device(config: Config) -> None:
    hardware = config.hardware
    if hardware.device == "cpu":
        return
    import torch

    if hardware.device == "cuda" and torch.cuda.device_count() < hardware.processes_per_node:
        raise ConfigError(
            f"hardware={hardware.name}: needs {hardware.processes_per_node} CUDA devices, and this machine has "
            f"{torch.cuda.device_count()}; use hardware=cpu_tiny, or hardware=laptop, which takes what is there"
        )
    if hardware.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("hardware.device=mps: this machine has none; use hardware.device=cpu")


def _follow_part(place: Place, order: dict[str, Any]) -> tuple[str, bool]:
    """Run what the leader asks for; what to tell it."""
    raw = order["config"]
    outcome = _run_part(place, parse(raw, METHODS[raw["method"]["name"]].Config), order)
    return outcome.dumped(), outcome.is_good


def _run_part(place: Place, config: Config, order: dict[str, Any]) -> Outcome:
    """The ranks of this node, or this one rank."""
    from opd.ranks import Node, run_rank, run_ranks

    logs = Path(order["logs"]) / f"{place.kind.removesuffix('s')}{place.number}"
    if place.kind == "nodes":
        return run_ranks(config, logs, order["launch"], Node(place.number, f"{place.host}:{place.port}"))
    return run_rank(config, logs, order["launch"], place.told)
