"""The jobs that were submitted, and their ends: written down by them; of those that could not, Slurm is asked."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from hydra_plugins.opd_launcher._jobs import Job, Outcome
from hydra_plugins.opd_launcher._slurm_job import outcome_file

log = logging.getLogger("opd")

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_GRACE = 20.0  # seconds in which the file of a job that has ended may still be on its way here
_LAST_LINES = 20


@dataclass
class Submitted:
    """A job in Slurm: its id, as 12_3 in an array, and the folder of its logs."""

    job: Job
    slurm_id: str
    folder: Path
    state: str = ""
    ended_at: float | None = None

    @property
    def log(self) -> Path:
        """What its first node said."""
        return self.folder / f"{self.slurm_id}_0_log.out"


def introduce(submitted: list[Submitted], *, skipped: int, folder: Path) -> None:
    """Tell where the jobs are, how to look at them and how to end them. `folder` is theirs; `skipped` were finished."""
    if skipped:
        log.info("finished before: %d", skipped)
    if not submitted:
        return
    lines = [f"  {_name(one)}  in {one.job.folder}" for one in submitted]
    arrays = sorted({one.slurm_id.partition("_")[0] for one in submitted})
    log.info("submitted to Slurm\n%s", "\n".join(lines))
    log.info("logs    %s", submitted[0].folder.parent / "*" / "*_log.out")
    log.info("watch   squeue --jobs=%s", ",".join(arrays))
    log.info("cancel  scancel %s", " ".join(arrays))
    log.info("result  %s", folder)


def wait_for(submitted: list[Submitted]) -> dict[int, Outcome]:
    """Tell the end of each job as it comes; by job number how it ended."""
    outcomes: dict[int, Outcome] = {}
    started, asked = time.monotonic(), float("-inf")
    while pending := [one for one in submitted if one.job.number not in outcomes]:
        now = time.monotonic()
        if now - asked > min(30, 3 + (now - started) / 10):  # the controller answers for the whole cluster
            asked = now
            if (states := _states(pending)) is not None:
                for one in pending:
                    _note(one, states.get(one.slurm_id, "gone from the queue"), now)
        for one in pending:
            end = _written(one) or _silent_end(one, now)
            if end is not None:
                outcomes[one.job.number] = end
                log.info("%s", _told(one, end))
        time.sleep(1)
    return outcomes


def _states(submitted: list[Submitted]) -> dict[str, str] | None:
    """State by job id. Of jobs that ended minutes ago Slurm knows nothing. None: it does not answer."""
    ids = ",".join(sorted({one.slurm_id.partition("_")[0] for one in submitted}))
    words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={ids}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return dict(line.split() for line in done.stdout.splitlines())


def _note(one: Submitted, state: str, now: float) -> None:
    has_ended = state in _ENDED or state.startswith("gone")
    if state in _WAITING and one.state and one.state not in _WAITING:
        log.info("%s: requeued; it continues from what it saved", _name(one))
    one.state = state
    one.ended_at = (one.ended_at or now) if has_ended else None


def _written(one: Submitted) -> Outcome | None:
    try:
        os.listdir(one.folder)  # makes a network file system look again
        told = json.loads(outcome_file(one.folder).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Outcome(told["code"], told["seconds"], told["said"], told["trace"])


def _silent_end(one: Submitted, now: float) -> Outcome | None:
    """Of a job that could not say how it ended: it was cancelled, or killed, or its node is gone."""
    if one.ended_at is None or now - one.ended_at < _GRACE:
        return None
    try:
        lines = one.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    except FileNotFoundError:
        if one.state == "CANCELLED":
            return Outcome(1, None, "cancelled before it began")
        return Outcome(1, None, f"ended without a word, and without a log (Slurm: {one.state})")
    return Outcome(1, None, f"ended without a word (Slurm: {one.state})", "\n".join(lines))


def _told(one: Submitted, end: Outcome) -> str:
    """What is said of a job that ended: in one line, or with the last lines of what it printed."""
    if end.code == 0:
        return f"{_name(one)}: finished in {end.seconds:.0f} s, in {one.job.folder}"
    shown = [f"    {line}" for line in [*end.trace.splitlines(), *end.said.splitlines()]]
    place = f"; its log: {one.log}" if one.log.exists() else ""
    return "\n".join([f"{_name(one)}: failed (exit {end.code}){place}", *shown])


def _name(one: Submitted) -> str:
    return " ".join(f"job {one.job.number} ({one.slurm_id}) {one.job.title}".split())
