"""The jobs of a sweep: all of them composed and checked before the first begins, and what is told of them at the end.

An underscore keeps Hydra from importing this at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from opd import slurm
from opd.composition import explain, plain
from opd.config import Config
from opd.errors import ConfigError, FinishedError, RunError

log = logging.getLogger("opd")


@dataclass
class Job:
    """One job. `title`: what tells it from the others. `config` is None where its folder holds it, finished."""

    number: int
    title: str
    composed: DictConfig
    raw: dict[str, Any]
    config: Config | None

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.raw["run"]["dir"]).expanduser()


@dataclass
class Outcome:
    """How a job ended: exit code, in how many seconds, and of a failure what was said, and where it came from."""

    code: int
    seconds: float | None = None
    said: str = ""
    trace: str = ""


FINISHED_BEFORE = Outcome(0, said="finished before")


def checked_jobs(
    context: HydraContext,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    *,
    check: Callable[[dict[str, Any]], Config],
    mode: RunMode = RunMode.MULTIRUN,
    name: str | None = None,
) -> list[Job]:
    """Every job, composed and accepted by `check`. Writes nothing.

    From now on hydra.sweep.dir of `master` is the sweep's folder. `name`: what stands in it for the time.

    Raises ConfigError with a line for whatever is wrong with any of them; FinishedError for a run that is no sweep.
    """
    _settle_folder(master, name)
    titles, jobs, refused = _titles(job_overrides), list[Job](), list[str]()
    for number, (overrides, title) in enumerate(zip(job_overrides, titles, strict=True), first):
        opening = f"job {number} ({title}): " if len(titles) > 1 else ""
        try:
            composed = _compose(context, master, overrides, number, mode, name)
            own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            raw = plain(own, submitted=mode == RunMode.RUN)  # a run that is no sweep is asked for by submitting alone
            jobs.append(job := Job(number, title, composed, raw, None))
            job.config = check(raw)
        except FinishedError:
            if mode == RunMode.RUN:
                raise
        except (HydraException, OmegaConfBaseException) as error:
            refused.append(opening + explain(error))
        except ConfigError as error:
            refused += [opening + line for line in str(error).splitlines()]
    refused += [
        f"run.dir={folder}: {count} jobs would write there; leave run.dir out, and each has a folder of its own"
        for folder, count in Counter(job.folder for job in jobs).items()
        if count > 1
    ]
    if refused:
        raise ConfigError("\n".join(refused))
    return jobs


def lasting_name(job_overrides: Sequence[Sequence[str]]) -> str | None:
    """What stands for the time in the folder of a sweep that its requeued Slurm job is to find again; else None.

    The jobs are part of it: the script may hold several sweeps.
    """
    if (step := slurm.step_name()) is None:
        return None
    return f"{step}-{hashlib.blake2b(json.dumps(job_overrides).encode(), digest_size=3).hexdigest()}"


def _settle_folder(config: DictConfig, name: str | None) -> str:
    """Put what hydra.sweep.dir stands for in its place; the same."""
    with read_write(config.hydra):
        if name:
            written: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
            config.hydra.sweep.dir = re.sub(r"\$\{now:[^}]*\}", name, written["dir"])
        config.hydra.sweep.dir = str(config.hydra.sweep.dir)
    return config.hydra.sweep.dir


def _compose(
    context: HydraContext,
    master: DictConfig,
    overrides: Sequence[str],
    number: int,
    mode: RunMode,
    name: str | None,
) -> DictConfig:
    """The job's config with Hydra's part, which is the current one from now on (HydraConfig)."""
    composed = context.config_loader.load_sweep_config(master, list(overrides))
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.mode = mode
        composed.hydra.job.id, composed.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(composed)
    if (own := _settle_folder(composed, name)) != master.hydra.sweep.dir:
        raise ConfigError(
            f"hydra.sweep.dir={own}: another job has {master.hydra.sweep.dir}, and a sweep has one folder; let "
            "hydra.sweep.subdir differ"
        )
    folder = Path(own, str(composed.hydra.sweep.subdir)).absolute()
    with read_write(composed.hydra.runtime):
        composed.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(composed)
    return composed


def _titles(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """The overrides in which a job differs from another."""
    told = [filter_overrides(overrides) for overrides in job_overrides]
    common = set.intersection(*map(set, told))
    return [" ".join(word for word in words if word not in common) for words in told]


def begin_sweep(master: DictConfig) -> Path:
    """The sweep's folder, made, with multirun.yaml in it."""
    folder = Path(master.hydra.sweep.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(master, folder / "multirun.yaml")
    except OSError as error:
        raise ConfigError(
            f"hydra.sweep.dir={folder}: cannot be written to ({error.strerror}); choose another"
        ) from None
    return folder


def conclude(jobs: list[Job], outcomes: dict[int, Outcome], folder: Path) -> None:
    """Tell how every job ended. Raises RunError where one failed."""
    width = max(len(job.title) for job in jobs)
    lines = []
    for job in jobs:
        end = outcomes[job.number]
        said = end.said.partition("\n")[0]
        told = f"failed (exit {end.code}): {said}" if end.code else said or "finished"
        seconds = "" if end.seconds is None else f"{end.seconds:.0f} s"
        lines.append(f"  {job.number:3}  {job.title:{width}}  {seconds:>8}  {told}")
    log.info("\n%s", "\n".join([f"jobs in {folder}", *lines]))
    failed = sum(bool(outcomes[job.number].code) for job in jobs)
    if len(jobs) - failed > 1:
        log.info("\nside by side: python -m opd.compare %s", folder)
    if failed:
        raise RunError(f"{failed} of {len(jobs)} jobs failed")
