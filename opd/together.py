"""Processes that something else started together: srun one on each node, or torchrun (accelerate launch) one a rank.

The first of them leads: it alone reads the command. It tells the others each run that begins, and when all is over;
they run their part and tell how that ended. They meet in a store that the leader keeps, or torchrun's agent. No torch
here before there is somebody to meet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from opd import slurm
from opd.errors import RunError

if TYPE_CHECKING:
    from torch.distributed import Store

# What torchrun and accelerate launch tell a process of its rank. It starts one, and is none: it may train walk models.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
_TO_MEET = timedelta(minutes=10)  # how much later than the first process another one may start, or end its part
_TO_HEAR = timedelta(minutes=1)  # until what another process knows of a failure, or hears of the end, is not waited for


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, and where they meet.

    `kind`: each has a node to start ranks on, or is to be one rank. `told`: what torchrun put in the environment.
    """

    kind: Literal["nodes", "ranks"]
    number: int
    count: int
    host: str
    port: int
    told: dict[str, str]

    @property
    def keeps_store(self) -> bool:
        """Whether the store lives in this process."""
        return self.number == 0 and self.told.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def is_alone() -> bool:
    """Whether this process was started as the only one of its kind."""
    return not _is_ranked() and slurm.num_tasks() == 1


def is_follower() -> bool:
    """Whether another process leads; from the environment alone."""
    return not is_alone() and (int(os.environ["RANK"]) if _is_ranked() else slurm.task()) > 0


def _is_ranked() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def take_place() -> Place | None:
    """This process's place; None where it was started alone. What torchrun told leaves the environment."""
    if _is_ranked():
        told = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_TOLD)}
        number, count = int(told["RANK"]), int(told["WORLD_SIZE"])
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **told}
        return Place("ranks", number, count, told["MASTER_ADDR"], int(told["MASTER_PORT"]), told)
    if slurm.num_tasks() > 1:
        host = os.environ.get("MASTER_ADDR") or slurm.first_address()
        port = int(os.environ.get("MASTER_PORT") or slurm.port())
        return Place("nodes", slurm.task(), slurm.num_tasks(), host, port, {})
    return None


class Leader:
    """The first process, which tells the others what to do."""

    def __init__(self, place: Place) -> None:
        self.place, self._store, self._said = place, _store(place), 0

    def begin(self, order: dict[str, Any]) -> None:
        """Have the others run their part of this; order["launch"] is a name of its own."""
        self._said += 1
        self._store.set(f"said/{self._said}", json.dumps(order))

    def hear(self, launch: str, report: str, *, is_good: bool) -> list[str]:
        """What all have to tell of their part, this process first; after a failure those who do so soon.

        Raises RunError where all went well here, and somebody does not answer.
        """
        if not is_good:
            self._store.set(failed_key(launch), "")
        others = [f"report/{self._said}/{number}" for number in range(1, self.place.count)]
        there = _until(lambda: self._store.check(others), _TO_MEET if is_good else _TO_HEAR)
        if is_good and not there:
            silent = [key.rpartition("/")[2] for key in others if not self._store.check([key])]
            raise RunError(
                f"process {', '.join(silent)} of {self.place.count} does not answer; its machine may be gone"
            )
        return [report, *(self._store.get(key).decode() for key in others if self._store.check([key]))]

    def dismiss(self) -> None:
        """Tell the others that this was all, and wait until they know if the store ends with this process."""
        self.begin({})
        if self.place.keeps_store:
            _until(lambda: self._store.add("dismissed", 0) == self.place.count - 1, _TO_HEAR)


def follow(place: Place, run_part: Callable[[dict[str, Any]], tuple[str, bool]]) -> None:
    """Run parts until the leader has no more. `run_part` returns a report, and whether all went well.

    Raises RunError where the leader is gone.
    """
    try:
        store, heard = _store(place), 0
        while True:
            heard += 1
            _until(lambda key=f"said/{heard}": store.check([key]), None)
            order = json.loads(store.get(f"said/{heard}"))
            if not order:
                store.add("dismissed", 1)
                return
            report, is_good = run_part(order)
            if not is_good:
                store.set(failed_key(order["launch"]), "")
            store.set(f"report/{heard}/{place.number}", report)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise RunError(f"the first process, on {place.host}, is gone or was never there: {line}") from None


def failed_key(launch: str) -> str:
    """What is in the store once a part of this launch has failed."""
    return f"failed/{launch}"


def key_prefix(told: Mapping[str, str]) -> str:
    """What the keys of these processes begin with: torchrun's store lives on when it restarts them.

    `told`: the environment that torchrun, or torch elastic here, made for a rank.
    """
    return f"opd/{told.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(place: Place) -> Store:
    from torch.distributed import DistNetworkError, PrefixStore, TCPStore

    try:
        # Torch elastic, which uses the same port, shares it.
        store = TCPStore(
            place.host,
            place.port,
            is_master=place.keeps_store,
            timeout=_TO_MEET,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistNetworkError as error:
        if not place.keeps_store:
            raise
        line = str(error).partition("\n")[0]
        raise RunError(
            f"port {place.port} of {place.host} cannot be used ({line}); set MASTER_PORT to another"
        ) from None
    return PrefixStore(key_prefix(place.told), store)


def _until(is_so: Callable[[], bool], patience: timedelta | None) -> bool:
    """Whether it became so in time. Asked again and again: a store's own waits would not hear a signal."""
    end = time.monotonic() + patience.total_seconds() if patience else float("inf")
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
