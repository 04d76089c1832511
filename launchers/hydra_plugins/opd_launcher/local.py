"""hydra/launcher=local: the jobs of a sweep on this machine, one after another, each with its own ranks."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from hydra_plugins.opd_launcher._jobs import Job, Outcome

    from opd.config import Config

log = logging.getLogger("opd")


class LocalLauncher(Launcher):
    """All jobs are checked before the first begins; one that fails does not stop the others.

    The same sweep with the same hydra.sweep.dir continues: what is finished is skipped, what was interrupted taken up.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over. The jobs run opd.stages.run whatever `task_function` is."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs. Raises ConfigError before the first one, RunError after the last where some have failed."""
        # What is imported here is not needed by commands that launch nothing, which import this file all the same.
        from hydra_plugins.opd_launcher._jobs import FINISHED_BEFORE, begin_sweep, checked_jobs, conclude, lasting_name

        from opd.artifacts.console import start_logging

        setup_globals()
        name = lasting_name(job_overrides)
        jobs = checked_jobs(self._context, self._config, job_overrides, initial_job_idx, check=_check, name=name)
        folder = begin_sweep(self._config)
        start_logging()
        log.info("%d jobs, one after another, in %s", len(jobs), folder)
        outcomes: dict[int, Outcome] = {}
        returns = []
        for place, job in enumerate(jobs, 1):
            log.info("\njob %d, %d of %d  %s  in %s", job.number, place, len(jobs), job.title, job.folder)
            if job.config is None:
                log.info("finished before")
                outcomes[job.number] = FINISHED_BEFORE
                returns.append(JobReturn(status=JobStatus.COMPLETED))
                continue
            try:
                returns.append(done := self._run(job))
            except KeyboardInterrupt:
                told = f"interrupted in job {job.number}; the same command with hydra.sweep.dir={folder} continues"
                raise KeyboardInterrupt(told) from None
            outcomes[job.number] = done.return_value
        conclude(jobs, outcomes, folder)
        return returns

    def _run(self, job: Job) -> JobReturn:
        """The job in Hydra's frame: its callbacks and hydra.job.env_set are heeded."""
        return run_job(
            hydra_context=self._context,
            task_function=lambda _: _attempt(job),
            config=job.composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _check(raw: dict[str, Any]) -> Config:
    from opd.devices import with_device
    from opd.launch import check_place
    from opd.stages import check

    config = check(with_device(raw))
    check_place(config)
    return config


def _attempt(job: Job) -> Outcome:
    """Run it here; its failure is told, and does not go on. Interruptions do: SystemExit of 85, 128 + a signal."""
    from hydra_plugins.opd_launcher._jobs import Outcome

    from opd.artifacts.console import start_logging
    from opd.errors import OpdError
    from opd.stages import run

    started, end = time.perf_counter(), Outcome(0)
    try:
        run(job.raw)
    except OpdError as error:
        sys.stderr.write("".join(f"opd: {line}\n" for line in str(error).splitlines()))
        end = Outcome(error.exit_code, said=str(error))
    except SystemExit as exit:
        if exit.code not in (1, 2, 3):
            raise
        end = Outcome(exit.code, said="its first rank has said why, above")
    except Exception as error:  # of one job; the others may be sound
        traceback.print_exc()
        end = Outcome(1, said=f"{type(error).__name__}: {error}")
    finally:
        start_logging()  # what comes next is not for the job's own log
        _free_memory()
    end.seconds = time.perf_counter() - started
    return end


def _free_memory() -> None:
    """Models hang in cycles; and the ranks of the next job, if it has several, share the device with this process."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
