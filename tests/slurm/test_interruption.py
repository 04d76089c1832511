"""What Slurm does to a job while it trains: nothing is lost, and it comes back by itself, unless it was cancelled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from launch.commands import HOLD, begin, faulty, fingerprint, finish, losses, wait_for_step

from slurm.cluster import Cluster, until
from slurm.jobs import Jobs

STEPS, STEP = 17, 15
# No checkpoint but that of the interruption, which comes between two lines of metrics.jsonl: at 14, and at the end.
TIMES = ("train.save_every_steps=0", "train.eval_every_steps=0", "train.log_every_steps=7")


@pytest.fixture(scope="module")
def jobs(slurm, tmp_path_factory, student, teacher, rows):
    return Jobs(slurm, tmp_path_factory.mktemp("jobs"), student, teacher, rows)


@pytest.fixture(scope="module")
def whole(jobs):
    """The run that nothing interrupts, of as many ranks and the same sharding, on this machine."""

    @cache
    def run(sharding: str) -> Path:
        folder, own = jobs.folder / f"whole-{sharding}", ("hardware=cpu_2rank", f"hardware.sharding={sharding}")
        code, said = finish(begin("opd", *jobs.words(folder, *TIMES, f"train.max_steps={STEPS}", *own)))
        assert code == 0, said
        return folder

    return run


@pytest.fixture(scope="module")
def submitted(jobs):
    """Submits the run on two machines; it waits in a step until a signal comes."""
    hold = faulty(jobs.folder, rank=0, fault=HOLD, step=STEP - 1)

    def submit(name: str, *options: str, sharding: str = "ddp") -> str:
        more = (*TIMES, "hardware.processes_per_node=1", f"hardware.sharding={sharding}")
        job = jobs.submit(name, *options, more=more, MAX_STEPS=str(STEPS), **hold)
        wait_for_step(jobs.folder / name, STEP - 1)
        return job

    return submit


def warn(slurm: Cluster, job: str) -> None:
    slurm.call("scancel", "--signal=USR2", job)


def preempt(slurm: Cluster, job: str) -> None:
    slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")


def end_time(slurm: Cluster, job: str) -> None:
    minutes = int(slurm.show(job)["RunTime"].split(":")[-2]) + 1
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


@pytest.mark.parametrize(
    ("interrupt", "sharding"),
    [(warn, "ddp"), (preempt, "ddp"), (end_time, "ddp"), (preempt, "fsdp2"), (warn, "zero3")],
)
def test_a_job_saves_and_is_requeued_and_ends_as_if_nothing_had_been(
    interrupt: Callable[[Cluster, str], None], sharding: str, submitted, jobs, slurm, whole
):
    name = f"{interrupt.__name__}-{sharding}"
    job = submitted(name, "--signal=USR2@50", sharding=sharding)
    interrupt(slurm, job)
    until(lambda: f"job {job} is requeued and continues from there" in jobs.said(name), seconds=90)
    assert (jobs.folder / name / f"checkpoint-{STEP}").is_dir()
    until(lambda: slurm.state(job) in ("PENDING", "RUNNING"), seconds=60)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert slurm.ended(job) == "COMPLETED", jobs.said(name)
    assert slurm.show(job)["Restarts"] == "1"
    assert jobs.said(name).count("interrupted; ") == 1
    assert f"continues the interrupted run in {name} from step {STEP}" in jobs.said(name)
    assert losses(jobs.folder / name) == losses(whole(sharding))
    assert fingerprint(jobs.folder / name) == fingerprint(whole(sharding))


def test_a_cancelled_job_has_saved_and_does_not_come_back_by_itself(submitted, jobs, slurm, whole):
    job = submitted("cancelled")
    slurm.call("scancel", job)
    assert slurm.ended(job) == "CANCELLED", jobs.said("cancelled")
    assert (jobs.folder / "cancelled" / f"checkpoint-{STEP}").is_dir(), jobs.said("cancelled")
    assert slurm.show(job)["Restarts"] == "0"
    more = (*TIMES, "hardware.processes_per_node=1")
    again = jobs.submit("cancelled", more=more, MAX_STEPS=str(STEPS))
    assert slurm.ended(again) == "COMPLETED", jobs.said("cancelled")
    assert losses(jobs.folder / "cancelled") == losses(whole("ddp"))
    assert fingerprint(jobs.folder / "cancelled") == fingerprint(whole("ddp"))
