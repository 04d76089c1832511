"""A Slurm of one machine: munged, slurmctld and a slurmd for each node, as plain processes on the loopback.

Everything lies in one folder, nothing is installed or left behind, root is not needed, and several can run side by
side. Needs the packages slurm-wlm and munge. By hand, until Ctrl-C:  python tests/slurm/cluster.py FOLDER
"""

from __future__ import annotations

import argparse
import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
RUNNING = ("CONFIGURING", "RUNNING", "COMPLETING", "PENDING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD")

# Without a database for accounting there is no sacct, and submitit would wait for ever for a job that died.
_SACCT = """#!/usr/bin/env bash
ids=()
while (($#)); do [[ $1 == -j ]] && { ids+=("$2"); shift; }; shift; done
echo "JobID|State|NodeList"
exec squeue -h -r -t all -o '%i|%T|%N' -j "$(IFS=,; echo "${ids[*]}")"
"""

# config_overrides: nodes may claim more CPUs than the machine has. cred_expire is also what a requeued job waits for.
_CONFIG = """ClusterName=opdtest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
JobRequeue=1
FirstJobId={port}
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """`nodes` machines n1, n2, … of `cpus` CPUs and `gpus` pretended GPUs; partitions main, and high, which preempts.

    As a context it runs from start to stop. `env` is what a command needs to speak to it.
    """

    def __init__(
        self, folder: Path, *, nodes: int = 2, cpus: int = 4, gpus: int = 0, grace: int = 15, kill_wait: int = 15
    ) -> None:
        self.folder = folder.resolve()
        self._nodes, self._cpus, self._gpus, self._grace, self._kill_wait = nodes, cpus, gpus, grace, kill_wait
        self._daemons = ExitStack()
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder / 'bin'}:{_PATH}",
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._daemons.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.call("scancel", "--quiet", "--user", getpass.getuser(), check=False)
        until(lambda: not self.call("squeue", "-h", check=False), seconds=30, or_not=True)
        self._daemons.close()

    def call(self, *words: Any, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """What a command of Slurm's, or any other, prints there."""
        done = subprocess.run(
            [str(word) for word in words],
            env={**self.env, **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: Any, cwd: Path | None = None, **env: str) -> str:
        """sbatch with these words; the job's id."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **env).split(";")[0]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, …; also of one task of an array, as 12_3."""
        return self.call("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").partition("\n")[0]

    def show(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, ExitCode, Restarts, NumNodes, TresPerNode, …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", job)))

    def ended(self, job: str, seconds: float = 240) -> str:
        """The state in which a job ended."""
        return until(lambda: None if (state := self.state(job)) in RUNNING else state, seconds=seconds)

    def _start(self) -> None:
        user, ports = getpass.getuser(), _free_ports(1 + self._nodes)
        for name in ("state", "bin", *(f"spool-n{i + 1}" for i in range(self._nodes))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "bin" / "sacct").write_text(_SACCT)
        (self.folder / "bin" / "sacct").chmod(0o755)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "slurm.conf").write_text(self._config(user, ports))
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={self.folder / name}" for option, name in {**names, "log-file": "munged.log"}.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        until((self.folder / "munge.socket").is_socket, seconds=20)
        self._daemon("slurmctld", "-D", "-c")
        for node in range(self._nodes):
            self._daemon("slurmd", "-D", "-N", f"n{node + 1}")
        try:
            until(self._is_idle, seconds=60)
        except TimeoutError:
            logs = [f"{log}:\n{log.read_text(errors='replace')[-2000:]}" for log in self.folder.glob("*.log")]
            raise RuntimeError("\n".join(["the nodes did not come up", *logs])) from None

    def _is_idle(self) -> bool:
        states = self.call("sinfo", "-h", "-p", "main", "-N", "-o", "%T", check=False).split()
        return states == ["idle"] * self._nodes

    def _config(self, user: str, ports: list[int]) -> str:
        host = socket.gethostname().partition(".")[0]
        text = _CONFIG.format(host=host, user=user, folder=self.folder, port=ports[0], kill_wait=self._kill_wait)
        gpus = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        text += "GresTypes=gpu\n" if self._gpus else ""
        devices = ""
        for node, port in enumerate(ports[1:], 1):
            text += (
                f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={self._cpus} ThreadsPerCore=1 RealMemory=8192{gpus}\n"
            )
            for number in range(self._gpus):
                device = self.folder / f"spool-n{node}" / f"nvidia{number}"
                device.unlink(missing_ok=True)
                device.symlink_to("/dev/null")
                devices += f"NodeName=n{node} Name=gpu File={device} Flags=nvidia_gpu_env\n"
        if devices:
            (self.folder / "gres.conf").write_text(devices)
        both = "Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO"
        text += f"PartitionName=main {both} Default=YES PriorityTier=1 GraceTime={self._grace}\n"
        return text + f"PartitionName=high {both} PriorityTier=10 PreemptMode=OFF\n"

    def _daemon(self, *words: str) -> None:
        output = self._daemons.enter_context((self.folder / f"{words[0]}.out").open("ab"))
        process = subprocess.Popen(
            words,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._daemons.callback(_end, process)


def until(answer: Callable[[], Any], *, seconds: float, or_not: bool = False) -> Any:
    """The first true answer. Raises TimeoutError where there is none in that time, unless it may be false."""
    end = time.monotonic() + seconds
    while not (found := answer()):
        if time.monotonic() > end:
            if or_not:
                return found
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.2)
    return found


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="a node")
    parser.add_argument("--gpus", type=int, default=0, help="a node; they are pretended")
    words = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"missing: {', '.join(missing)}; apt-get install --no-install-recommends slurm-wlm munge")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(words.folder, nodes=words.nodes, cpus=words.cpus, gpus=words.gpus) as cluster:
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']} PATH={cluster.folder / 'bin'}:$PATH", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    _main()
