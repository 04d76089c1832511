"""A process that is one rank: python -m opd.worker SPECIFICATION.json, with RANK and its like in the environment.

The specification: the run's `config`; `launch`, a name that no earlier run of these processes had; and `parent`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import interruption
from opd.background import repeated
from opd.failures import GONE, recorded
from opd.together import failed_key, key_prefix

if TYPE_CHECKING:  # torch takes a second, in which a signal should find its handler
    from torch.distributed import Store

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Join the other ranks and run. It ends when its launcher does, however that ends, and when another rank fails."""
    interruption.listen()
    file = Path(sys.argv[1])
    specification = json.loads(file.read_text(encoding="utf-8"))
    _end_with(specification["parent"])
    interruption.listens(file.parent)
    with recorded():
        _run(specification)


def _run(specification: dict[str, Any]) -> None:
    import torch.distributed as dist

    from opd import rank
    from opd.conditions import validated

    launch = specification["launch"]
    config = validated(specification["config"])
    # One of those that this rank is about to wait for may have failed already.
    with (
        _ending_with_the_others(_meeting_place(), failed_key(launch)),  # a store of its own: waiting blocks its users
        rank.joined(config.hardware, dist.PrefixStore(f"ranks/{launch}", _meeting_place())),
    ):
        rank.run(config)


def _end_with(parent: int) -> None:
    """Be killed with the launcher: nobody would tell what becomes of this rank."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def _meeting_place() -> Store:
    from torch.distributed import PrefixStore, TCPStore

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=10))
    return PrefixStore(key_prefix(os.environ), store)


def _ending_with_the_others(store: Store, failed: str) -> AbstractContextManager[None]:
    """Where ranks are on several machines, nobody else ends this one, which may wait in a collective for hours."""

    def look(is_left: threading.Event) -> None:
        try:
            is_over = store.check([failed])
        except RuntimeError:  # whoever started the first rank is gone
            is_over = True
        if is_over and not is_left.is_set():  # a rank at its end tells it itself
            os._exit(GONE)

    return repeated(look, seconds=1)


if __name__ == "__main__":
    main()
