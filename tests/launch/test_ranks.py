"""python -m opd hardware=cpu_2rank: what becomes of its ranks when one of them, or their launcher, does not go well."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading

import psutil
import pytest

from launch.commands import begin, faulty, finish, losses, ranks_of, wait_for_step
from opd import interruption

TWO = "hardware=cpu_2rank"


def test_the_traceback_of_the_rank_that_failed_is_what_the_user_sees(words, tmp_path):
    env = faulty(tmp_path, rank=1, fault='raise ValueError("a bug of rank 1")')
    code, said = finish(begin("opd", *words(tmp_path / "run", TWO), env=env))
    assert code == 1, said
    assert said.count("Traceback") == 1, said  # not the other rank's, which was left alone
    *_, error, line = said.strip().splitlines()
    assert error == "ValueError: a bug of rank 1"
    assert re.match(r"opd: rank 1 on \S+ failed: ValueError: a bug of rank 1; its output: \S+", line)
    assert len(losses(tmp_path / "run")) == 2  # before, and the step before


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_with_the_signal(words, tmp_path):
    env = faulty(tmp_path, rank=1, fault="os.kill(os.getpid(), 9)")
    code, said = finish(begin("opd", *words(tmp_path / "run", TWO), env=env))
    assert code == 1, said
    assert "Traceback" not in said
    assert re.match(r"opd: rank 1 on \S+ was ended by SIGKILL \(.*memory", said.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_rank_out_of_memory_says_what_to_change(words, tmp_path):
    env = faulty(tmp_path, rank=1, fault="import torch; torch.empty(1 << 50)")
    code, said = finish(begin("opd", *words(tmp_path / "run", TWO), env=env))
    assert code == 1, said
    assert "Traceback" not in said
    assert "opd: rank 1: " in said and "opd:   1. model.student.gradient_checkpointing=true" in said, said


def test_ctrl_c_ends_all_ranks_with_130(words, tmp_path):
    process = begin("opd", *words(tmp_path / "run", TWO, "train.max_steps=5000"))
    wait_for_step(tmp_path / "run", 2, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.killpg(process.pid, signal.SIGINT)
    code, said = finish(process, 60)
    assert code == 130, said
    assert said.strip().endswith(f"interrupted; the same command with run.dir={tmp_path / 'run'} continues")
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed(words, tmp_path):
    process = begin("opd", *words(tmp_path / "run", TWO, "train.max_steps=5000"))
    wait_for_step(tmp_path / "run", 2, process)
    ranks = ranks_of(process)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(ranks) == 2 and not alive
    process.communicate()


@pytest.mark.slow
def test_a_command_that_nohup_started_outlives_its_terminal(words, tmp_path):
    env = faulty(tmp_path, rank=1, fault="import signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(1)")
    with interruption.restored(signal.SIGHUP):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the command inherits, as of nohup
        process = begin("opd", *words(tmp_path / "run", TWO), env=env)
    code, said = finish(process)
    assert code == 0, said


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(words):
    from e2e.command import call

    answer = call(*words("/proc/nowhere/run", TWO))
    assert (answer.code, answer.lines) == (
        2,
        ["opd: run.dir=/proc/nowhere/run: cannot be made (No such file or directory); choose another folder"],
    )


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["hardware.nodes=2"], "opd: hardware.nodes=2: nobody started this command on the other machines; use"),
        (["hardware.device=cuda"], "opd: hardware=cpu_2rank: needs 2 CUDA devices, and this machine has "),
    ],
    ids=["nodes", "devices"],
)
def test_machines_and_devices_that_are_not_there_are_refused(words, tmp_path, more, line):
    from e2e.command import call

    answer = call(*words(tmp_path / "run", TWO, *more))
    assert answer.code == 2
    assert len(answer.lines) == 1 and answer.stderr.startswith(line), answer.stderr
    assert not (tmp_path / "run").exists()


def test_no_thread_of_a_rank_is_left_inside_of_torch_when_python_ends():
    """Two of some two hundred ranks aborted after a good run ("terminate called without an active exception")."""
    from torch.distributed import TCPStore

    from opd.worker import _ending_with_the_others

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = set(threading.enumerate())
    with _ending_with_the_others(store, "failed"):
        (watcher,) = set(threading.enumerate()) - before
    assert not watcher.is_alive()


def test_an_interrupted_rank_leaves_its_group_before_python_ends():
    """One of some thousand aborted after its checkpoint: a thread of gloo's still had to let go of a tensor.

    After an error it does not: leaving waits for collectives that others may never come to.
    """
    import torch.distributed as dist

    from opd import rank
    from opd.config import Hardware

    one = Hardware(name="one", device="cpu", nodes=1, processes_per_node=1, precision="fp32", threads=1)
    with pytest.raises(SystemExit), rank.joined(one, dist.HashStore()):
        sys.exit(85)
    assert not dist.is_initialized()
    with pytest.raises(ValueError), rank.joined(one, dist.HashStore()):
        raise ValueError
    assert dist.is_initialized()
    dist.destroy_process_group()
