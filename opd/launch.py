"""One command -> its ranks. One process runs in place; more are started by torch elastic, without Hydra in them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from opd.artifacts.run_folder import RANK_LOGS, RunFolder
from opd.config import Config
from opd.errors import ConfigError, RunError

_SAID = (2, 3)  # exit codes of a rank: config or data, and preflight; rank 0 has said what


def launch(config: Config) -> None:
    """Run the config on the processes that its hardware asks for."""
    if "RANK" in os.environ:
        raise ConfigError(
            f"RANK={os.environ['RANK']}: opd starts its own ranks; use python -m opd hardware=… without torchrun"
        )
    if config.hardware.nodes > 1:
        raise ConfigError(f"hardware.nodes={config.hardware.nodes}: several nodes are not built yet; set it to 1")
    RunFolder(config)  # refuse a folder that cannot be used before anything is loaded or trained for it
    _check_device(config)
    from opd import pipeline

    config = pipeline.prepare(config)
    if config.hardware.processes_per_node == 1:
        pipeline.run(config)
    else:
        _start_ranks(config)


def _check_device(config: Config) -> None:
    import torch

    hardware = config.hardware
    if hardware.device == "cuda" and torch.cuda.device_count() < hardware.processes_per_node:
        raise ConfigError(
            f"hardware={hardware.name}: needs {hardware.processes_per_node} CUDA devices, and this machine has "
            f"{torch.cuda.device_count()}; use hardware=cpu_tiny"
        )
    if hardware.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("hardware.device=mps: this machine has none; use hardware.device=cpu")


def _start_ranks(config: Config) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = Path(config.run.dir).resolve()
    logs = folder / RANK_LOGS
    logs.mkdir(parents=True, exist_ok=True)
    specification = logs / "config.json"
    specification.write_text(config.model_dump_json(), encoding="utf-8")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.hardware.threads))
    ranks = config.hardware.processes_per_node
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=folder.name,
        role="opd",
        max_restarts=0,
        monitor_interval=0.2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # Rank 0 has the console; the others write to files.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, ranks), Std.ALL)),
    )
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", "opd.worker", str(specification))
    except SignalException as error:  # the ranks have been stopped
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _SAID:
            sys.exit(failure.exitcode)
        raise RunError(f"rank {rank} failed (exit code {failure.exitcode}): {failure.message}; see {logs}") from None
