"""SIGTERM, as `docker stop` and `kill` send it: the step is finished, saved, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from e2e.command import call

from launch.commands import HOLD, begin, faulty, fingerprint, finish, losses, wait_for_step
from opd import interruption
from opd.stages import run

STEPS, STEP = 6, 4
# No checkpoint but that of the interruption, which comes between two lines of metrics.jsonl: at 3, and at the end.
TIMES = (f"train.max_steps={STEPS}", "train.save_every_steps=0", "train.log_every_steps=3")


@pytest.mark.slow
def test_a_terminated_run_saves_its_step_and_continues_as_if_nothing_had_been(words, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = finish(begin("opd", *words(whole, *TIMES)))
    assert code == 0, said
    process = begin("opd", *words(broken, *TIMES), env=faulty(tmp_path, rank=None, fault=HOLD, step=STEP - 1))
    wait_for_step(broken, 3, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 128 + signal.SIGTERM, said
    assert f"interrupted: checkpoint-{STEP} is saved" in said
    assert [line["step"] for line in losses(broken)] == [0, 3]
    sums = json.loads((broken / f"checkpoint-{STEP}" / "unlogged-rank0.json").read_text())
    assert sums["steps"] == 1
    code, said = finish(begin("opd", *words(broken, *TIMES)))
    assert code == 0, said
    assert losses(broken) == losses(whole)
    assert fingerprint(broken) == fingerprint(whole)


SLOW = f"{HOLD}\n{12 * ' '}time.sleep(31)"  # torch elastic would have killed it after 30 seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number", "code", "fault"),
    [
        ({"SLURM_JOB_ID": "12"}, signal.SIGUSR2, 85, HOLD),
        ({}, signal.SIGTERM, 143, SLOW),
    ],
    ids=["slurm", "long step"],
)
def test_what_only_the_command_hears_its_ranks_hear_too_and_take_their_time(job, number, code, fault, words, tmp_path):
    env, run = faulty(tmp_path, rank=1, fault=fault, step=3), tmp_path / "run"
    process = begin("opd", *words(run, *TIMES, "hardware=cpu_2rank"), env={**env, **job})
    wait_for_step(run, 3, process)
    process.send_signal(number)
    ended, said = finish(process)
    assert ended == code, said
    assert "interrupted: checkpoint-4 is saved" in said and (run / "checkpoint-4").is_dir(), said
    assert said.count("interrupted; ") == 1 and "death signal" not in said, said


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The words of each call of scontrol, in a batch job that runs."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho JobState=RUNNING BatchFlag=1\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").is_file() else []


def interrupted_here(*_):
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(10)


REQUEUED = ["show job 12", "requeue 12"]


@pytest.mark.parametrize("where", ["opd.__main__._compose_and_run", "opd.stages.launch"], ids=["composing", "running"])
def test_a_job_is_requeued_wherever_the_signal_finds_its_command(where, asked, words, tmp_path, monkeypatch):
    monkeypatch.setattr(where, interrupted_here)
    answer = call(*words(tmp_path / "run"))
    assert (answer.code, asked()) == (interruption.INTERRUPTED, REQUEUED)


@pytest.mark.parametrize("role", [["hydra/launcher=slurm"], []], ids=["submits", "follows"])
def test_a_job_is_not_requeued_to_submit_again_nor_by_every_machine(role, asked, monkeypatch):
    if not role:
        for name, value in {"STEP_ID": "0", "STEP_NUM_TASKS": "2", "PROCID": "1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setattr("opd.__main__._command_together", interrupted_here)
    monkeypatch.setattr("opd.__main__._command", interrupted_here)
    assert (call(*role).code, asked()) == (interruption.INTERRUPTED, [])


def test_a_run_inside_of_another_command_leaves_it_to_that_to_requeue(asked, monkeypatch):
    """As in a job of hydra/launcher=slurm; a second request is refused, and what is told of it is wrong."""
    monkeypatch.setattr("opd.stages._planned", interrupted_here)
    with pytest.raises(SystemExit), interruption.requeued(), interruption.handled():
        run({"hardware": {"device": "cpu", "precision": "fp32"}})
    assert asked() == REQUEUED


@pytest.mark.parametrize(
    ("job", "number", "code"),
    [(None, signal.SIGTERM, 143), ("12", signal.SIGTERM, 85), ("12", signal.SIGUSR2, 85)],
    ids=["kill", "scancel", "time"],
)
def test_where_there_is_no_step_to_finish_the_process_ends_at_once(job, number, code, monkeypatch):
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, interruption.handled():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert ended.value.code == code
    assert signal.getsignal(number) is before  # submitit's, in its jobs


def test_a_signal_that_came_at_a_bad_moment_is_answered_at_a_better_one(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with interruption.handled():
        interruption.leave_if_requested()
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert interruption.requested()
        with pytest.raises(SystemExit):
            interruption.leave_if_requested()
