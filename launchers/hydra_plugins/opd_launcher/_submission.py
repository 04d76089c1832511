"""From checked jobs to Slurm's: what each asks for, and sbatch by way of submitit."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from hydra_plugins.opd_launcher._jobs import Job
from hydra_plugins.opd_launcher._keys import check_keys
from hydra_plugins.opd_launcher._queue import Submitted
from hydra_plugins.opd_launcher._slurm_job import run
from hydra_plugins.opd_launcher._snapshot import checkout, take_snapshot
from omegaconf import OmegaConf

from opd.config import Config
from opd.errors import ConfigError

log = logging.getLogger("opd")

_IGNORE = "trap '' USR2 TERM"  # until opd listens: they would end the shell, srun, and a Python that is still starting


def check_slurm() -> None:
    """Raise ConfigError where there is no Slurm to submit to."""
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise ConfigError(
            f"hydra/launcher=slurm: no {', '.join(missing)} on the PATH here; submit from a machine of the cluster, or "
            "leave it out to run on this one"
        )


def check_folder(folder: Path, key: str) -> None:
    """Raise ConfigError where Slurm would not write logs below `folder`, the value of `key`, but elsewhere."""
    if "%" in str(folder.absolute()):
        raise ConfigError(
            f"{key}={folder}: Slurm puts something else for a % in the path of its logs, {folder.absolute()}; choose "
            "another folder"
        )


def by_resources(jobs: list[Job]) -> list[tuple[dict[str, Any], list[Job]]]:
    """The jobs that are not finished, by what they ask of Slurm; each group becomes an array. Raises ConfigError."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.config is not None:
            groups.setdefault(json.dumps(_parameters(job, job.config), sort_keys=True), []).append(job)
    return [(json.loads(asked), group) for asked, group in groups.items()]


def _parameters(job: Job, config: Config) -> dict[str, Any]:
    """What sbatch is asked for, in submitit's words."""
    asked: Any = OmegaConf.to_container(job.composed.hydra.launcher, resolve=True)
    hardware = config.hardware
    check_keys(asked)
    if asked["signal_delay_s"] >= 60 * asked["timeout_min"]:
        raise ConfigError(
            f"hydra.launcher.signal_delay_s={asked['signal_delay_s']}: not less than the time limit, "
            f"hydra.launcher.timeout_min={asked['timeout_min']}; lower it"
        )
    if asked["gpus_per_node"] is None and hardware.device == "cuda" and "gpu" not in str(asked["gres"]):
        asked["gpus_per_node"] = hardware.processes_per_node
    if asked["cpus_per_task"] is None:
        asked["cpus_per_task"] = hardware.threads * hardware.processes_per_node
    more = asked["additional_parameters"] or {}
    named = {
        "job_name": asked.pop("name"),
        "time": asked.pop("timeout_min"),
        "mem": None if asked["mem_gb"] is None else f"{asked['mem_gb']}GB",
        "nodes": hardware.nodes,
        "ntasks_per_node": 1,
        "exclusive": asked.pop("exclusive") or None,
        # A dead node ends the step, or the others would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", *asked.pop("srun_args")],
        # A cluster may not requeue what does not ask for it, and then a run that has saved would not go on.
        "additional_parameters": {**({} if {"no-requeue", "no_requeue"} & more.keys() else {"requeue": True}), **more},
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own, which some clusters refuse
    }
    for key in ("_target_", "mode", "wait", "mem_gb"):
        del asked[key]
    return {**asked, **named}


def submit(groups: list[tuple[dict[str, Any], list[Job]]], folder: Path) -> list[Submitted]:
    """One array for each group, a plain job for a group of one. Logs, and a copy of a checkout's code, go to `folder`.

    Raises ConfigError where sbatch refuses.
    """
    if not groups:
        return []
    is_new = not folder.exists()
    snapshot = take_snapshot(folder) if checkout() else None
    if snapshot is not None:
        log.info("the jobs run the code as it is now: %s is copied to %s", checkout(), snapshot)
    submitted: list[Submitted] = []
    for asked, jobs in groups:
        arguments = [(job.raw, _words(job), _environment(job), snapshot and str(snapshot)) for job in jobs]
        try:
            with _outside_of_jobs(), redirect_stderr(StringIO()):  # what sbatch says is told once, below
                executor = submitit.SlurmExecutor(folder=folder / "%j", python=_python())
                executor.update_parameters(**{**asked, "setup": [*_setup(snapshot), *asked["setup"]]})
                handles = executor.map_array(run, *zip(*arguments, strict=True))
        except RuntimeError as error:
            if is_new and not submitted:
                _remove(folder)
            told = "; ".join(" ".join(line.split()) for line in str(error).splitlines() if line.strip())
            before = ", ".join(one.slurm_id for one in submitted)
            told += f"; submitted before, and going on: {before}" if before else ""
            raise ConfigError(f"hydra/launcher=slurm: {told}") from None
        submitted += [Submitted(job, one.job_id, one.paths.folder) for job, one in zip(jobs, handles, strict=True)]
    return submitted


def _remove(folder: Path) -> None:
    """Leave nothing of a submission that was refused, nor the run's folder if it was made for it."""
    shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def _python() -> str:
    """How srun starts Python: a process that it starts does not inherit what the job's script ignores."""
    return shlex.join(["sh", "-c", f'{_IGNORE}; exec "$@"', "sh", sys.executable])


def _setup(snapshot: Path | None) -> list[str]:
    """Lines of the job's script."""
    if snapshot is None:
        return [_IGNORE]
    path = shlex.quote(f"{snapshot}:{snapshot / 'launchers'}")
    return [_IGNORE, f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"]


def _words(job: Job) -> list[str]:
    return list(job.composed.hydra.overrides.task)


def _environment(job: Job) -> dict[str, str]:
    return {str(name): str(value) for name, value in job.composed.hydra.job.env_set.items()}


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Submit as from a login node: inside a job, sbatch would take over what was asked for that job."""
    inherited = ("SLURM_", "SRUN_", "SBATCH_")
    own = {name: os.environ[name] for name in os.environ if name.startswith(inherited) and name != "SLURM_CONF"}
    own = own if "SLURM_JOB_ID" in own else {}
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)
