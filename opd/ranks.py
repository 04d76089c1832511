"""Processes that are ranks: those of this machine, started and watched by torch elastic; or one of torchrun's."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opd import interruption
from opd.config import Config
from opd.failures import FILE, Outcome, outcome, own_ends

# At these torch elastic ends the ranks: in 30 seconds, so not at SIGTERM, nor at what nohup has the command ignore.
_STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# python -m opd.worker, but of this very package: another may lie in the working folder.
_ROOT = str(Path(__file__).resolve().parents[1])
_WORKER = f"import sys; sys.path.insert(0, {_ROOT!r}); import opd; del sys.path[0]; from opd.worker import main; main()"
_SECONDS_TO_MEET = 600  # how long the machines of a run may differ in their start


@dataclass(frozen=True)
class Node:
    """A machine of the run: its number, and where all of them meet; None where it is the only one."""

    number: int = 0
    endpoint: str | None = None


def run_ranks(config: Config, logs: Path, launch: str, node: Node) -> Outcome:
    """Run this machine's ranks to their end. `launch`: a name that all machines of the run give it.

    Rank 0 has the console, the others write to files below `logs`. Signals that ask for an end are passed on, and
    the ranks take what time they need. Raises KeyboardInterrupt, or SystemExit(128 + signal), with no rank left.
    """
    for part in ("", ".agent.server.api"):  # failures and ends are told by us; the second has a level of its own
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.hardware.threads))
    ranks = config.hardware.processes_per_node
    console = {0} if node.number == 0 else set()
    quiet = {rank: Std.NONE if rank in console else Std.ALL for rank in range(ranks)}
    settings = LaunchConfig(
        min_nodes=config.hardware.nodes,
        max_nodes=config.hardware.nodes,
        nproc_per_node=ranks,
        run_id=launch,
        role="opd",
        max_restarts=0,
        monitor_interval=0.2,
        # "c10d" would make another machine than the first the host of rank 0.
        rdzv_backend="static" if node.endpoint else "c10d",
        rdzv_endpoint=node.endpoint or "localhost:0",
        rdzv_configs={"rank": node.number, "timeout": _SECONDS_TO_MEET} if node.endpoint else {},
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
        signals_to_handle=",".join(stop.name for stop in _STOPS if signal.getsignal(stop) is not signal.SIG_IGN),
    )
    words = ("-u", "-c", _WORKER, str(_specification(config, logs, launch)))
    exit_codes: dict[int, int] = {}
    with interruption.restored(*_STOPS), interruption.deferred(), interruption.passed_on(logs):
        try:
            elastic_launch(settings, sys.executable)(*words)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            ends = {rank: (failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
            exit_codes = own_ends(ends)
    return outcome(logs, exit_codes)


def run_rank(config: Config, logs: Path, launch: str, told: Mapping[str, str]) -> Outcome:
    """Run the one rank that torchrun started a process for; `told`: what torchrun put in its environment."""
    rank = int(told["RANK"])
    environment = {
        **os.environ,
        # hardware says what accelerate launch would say here
        **{name: value for name, value in told.items() if not name.startswith("ACCELERATE_")},
        "TORCHELASTIC_ERROR_FILE": str(logs / FILE),
    }
    environment.setdefault("OMP_NUM_THREADS", str(config.hardware.threads))
    words = [sys.executable, "-u", "-c", _WORKER, str(_specification(config, logs, launch))]
    with ExitStack() as stack:
        output = stack.enter_context((logs / "output.log").open("wb")) if rank else None
        stack.enter_context(interruption.deferred())
        stack.enter_context(interruption.passed_on(logs))
        # Of this process's group, all of which torchrun signals.
        process = stack.enter_context(subprocess.Popen(words, env=environment, stdout=output, stderr=output))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            raise
    return outcome(logs, {rank: code} if code else {})


def _specification(config: Config, logs: Path, launch: str) -> Path:
    """The file that opd.worker reads."""
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / "specification.json"
    told = {"config": config.model_dump(mode="json"), "launch": launch, "parent": os.getpid()}
    file.write_text(json.dumps(told), encoding="utf-8")
    return file
