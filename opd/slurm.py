"""What Slurm says of this process: its job, and which task of a step it is; and how the job comes back."""

from __future__ import annotations

import os
import re
import socket
import subprocess

_TIMEOUT = 60  # seconds for an answer of the controller


def in_job() -> bool:
    """Whether this process belongs to a job."""
    return "SLURM_JOB_ID" in os.environ


def num_tasks() -> int:
    """Processes that srun started together with this one; 1 outside of a step."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def task() -> int:
    """This process's number among them."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def num_nodes() -> int:
    """Nodes that they run on."""
    return int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))


def job_id() -> str:
    """The job's id; of an array's task 12_3: the plain id of one of its tasks is that of the whole array."""
    array, number = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{number}" if array and number else os.environ["SLURM_JOB_ID"]


def step_name() -> str | None:
    """A name that the same command has again when its job is requeued; None where nothing would come back.

    Steps are numbered as the job's script starts them; "batch" is the script itself. What somebody types in an
    interactive job does not come back.
    """
    if "SLURM_STEP_ID" in os.environ:
        return None if "SLURM_PTY_PORT" in os.environ else f"slurm-{job_id()}.{os.environ['SLURM_STEP_ID']}"
    return f"slurm-{job_id()}.batch" if in_job() and "SLURM_TASK_PID" in os.environ else None


def first_address() -> str:
    """Where the step's first task can be reached."""
    hosts = _ask("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).stdout.split()
    try:
        socket.getaddrinfo(hosts[0], None)
    except (OSError, IndexError):  # names that only Slurm knows
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return hosts[0]


def port() -> int:
    """One port for the whole step, and another for each job and step that may share its first node."""
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    return 20000 + (37 * job + step) % 10000


def requeue() -> str:
    """Put the job back into the queue if it is neither cancelled nor over its time; one line about what came of it."""
    job = job_id()
    shown = dict(re.findall(r"(\S+?)=(\S*)", _ask("scontrol", "show", "job", job).stdout))
    state = shown.get("JobState", "unknown to Slurm")
    if state != "RUNNING":
        return f"job {job} is {state}: it is not requeued"
    if shown.get("BatchFlag") != "1":
        return f"job {job} is not a batch job: the same command with the same run.dir continues"
    done = _ask("scontrol", "requeue", job)
    if done.returncode:
        return (
            f"job {job} could not be requeued ({done.stderr.strip()}); submitted again with its run.dir, it continues"
        )
    return f"job {job} is requeued and continues from there"


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    """A command's answer; an empty one, of exit code 1, where the program is missing or the controller silent."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, stdout="", stderr=str(error))
