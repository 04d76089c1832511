"""SIGTERM, as `docker stop` and `kill` send it: the step is finished, saved, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from launch.commands import HOLD, begin, faulty, fingerprint, finish, losses, wait_for_step
from opd import interruption

STEPS, STEP = 6, 4
# No checkpoint but that of the interruption, which comes between two lines of metrics.jsonl: at 3, and at the end.
TIMES = (f"train.max_steps={STEPS}", "train.save_every_steps=0", "train.log_every_steps=3")


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
