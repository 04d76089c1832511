"""One rank, started by opd.launch: python -m opd.worker CONFIG.json."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from opd.conditions import validated
from opd.errors import OpdError
from opd.pipeline import run

_PR_SET_PDEATHSIG = 1


@record
def main() -> None:
    """Join the other ranks and run; end when the launcher does, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    config = validated(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if config.hardware.device == "cuda":  # or every rank would begin on the first one
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if config.hardware.device == "cuda" else "gloo")
    try:
        run(config)
    except KeyboardInterrupt:
        sys.exit(130)  # the launcher says it
    except OpdError as error:
        if dist.get_rank() == 0:
            for line in str(error).splitlines():
                sys.stderr.write(f"opd: {line}\n")
        sys.exit(error.exit_code)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
