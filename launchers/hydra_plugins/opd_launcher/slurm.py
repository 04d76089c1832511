"""hydra/launcher=slurm: a run, or every job of a sweep, as a Slurm job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import RunMode
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

if TYPE_CHECKING:
    from opd.config import Config


class OpdSlurmLauncher(SlurmLauncher):
    """Submitit's launcher, but that every job is checked before one is submitted, and that their ends are told truly.

    One task a node, which starts the ranks of its node (opd.launch). A job holds its config, composed, and no Hydra.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs that are not finished; wait for them unless hydra.launcher.wait=false.

        Raises ConfigError before anything is submitted, or where sbatch refuses it; where jobs failed RunError, or for
        a single run SystemExit with its exit code.
        """
        # What is imported here is not needed by commands that launch nothing, which import this file all the same.
        from hydra_plugins.opd_launcher import _jobs, _queue, _submission

        from opd.artifacts.console import start_logging
        from opd.artifacts.run_folder import SLURM

        assert self.config is not None and self.hydra_context is not None  # Hydra has called setup
        setup_globals()
        is_sweep = len(job_overrides) > 1 or bool({"-m", "--multirun"} & set(sys.argv[1:]))
        mode = RunMode.MULTIRUN if is_sweep else RunMode.RUN
        jobs = _jobs.checked_jobs(
            self.hydra_context, self.config, job_overrides, initial_job_idx, check=_check, mode=mode
        )
        groups = _submission.by_resources(jobs)
        folder = Path(self.config.hydra.sweep.dir) if is_sweep else jobs[0].folder
        _submission.check_folder(folder, "hydra.sweep.dir" if is_sweep else "run.dir")
        _submission.check_slurm()
        start_logging()
        if is_sweep:
            _jobs.begin_sweep(self.config)
        submitted = _submission.submit(groups, (folder / SLURM).absolute())
        outcomes = {job.number: _jobs.FINISHED_BEFORE for job in jobs if job.config is None}
        _queue.introduce(submitted, skipped=len(outcomes), folder=folder)
        if self.params["wait"]:
            try:
                outcomes |= _queue.wait_for(submitted)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("not waiting any more; the jobs go on, and scancel ends them") from None
            if not is_sweep:
                sys.exit(outcomes[initial_job_idx].code)
            _jobs.conclude(jobs, outcomes, folder)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]


def _check(raw: dict[str, Any]) -> Config:
    """As for a run here, but for the devices: the job's machine has others."""
    from opd.errors import ConfigError
    from opd.stages import check

    config = check(raw)
    if "auto" in (config.hardware.device, config.hardware.precision):
        raise ConfigError(
            f"hardware={config.hardware.name}: what auto stands for on the job's machine is not known here; use "
            "another hardware, or name hardware.device and hardware.precision"
        )
    return config
