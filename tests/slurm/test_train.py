"""The sbatch template on two machines: what it trains, and what it says when a rank fails."""

from __future__ import annotations

import pytest
from contract.tiny import assert_same_numbers
from launch.commands import begin, faulty, finish, losses

from slurm.jobs import Jobs


@pytest.fixture
def jobs(slurm, tmp_path, student, teacher, rows):
    return Jobs(slurm, tmp_path, student, teacher, rows)


def test_two_machines_with_two_ranks_each_train_what_one_process_does(jobs, slurm, tmp_path):
    job = jobs.submit("four")
    code, said = finish(begin("opd", *jobs.words(tmp_path / "one", "hardware=cpu_tiny")))
    assert code == 0, said
    assert slurm.ended(job) == "COMPLETED", jobs.said("four")
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == len(four) == 4  # before, two steps, after
    for mine, theirs in zip(one, four, strict=True):
        assert_same_numbers(mine, theirs, 1e-5)
    assert jobs.said("four").count("Samples before training") == 1
    assert {path.name for path in (tmp_path / "four").glob("training*.log")} == {
        "training.log",
        *(f"training-rank{rank}.log" for rank in (1, 2, 3)),
    }


def test_a_crash_on_the_last_rank_is_shown_as_such_and_fails_the_job(jobs, slurm, tmp_path):
    env = faulty(tmp_path, rank=3, fault='raise ValueError("a bug of rank 3")')
    job = jobs.submit("crash", **env)
    assert slurm.ended(job) == "FAILED", jobs.said("crash")
    said = jobs.said("crash")
    assert slurm.show(job)["ExitCode"] == "1:0", said
    assert said.count("Traceback") == 1, said
    assert "\nValueError: a bug of rank 3\nopd: rank 3 on " in said, said


def test_a_bad_value_ends_all_machines_with_one_line(jobs, slurm):
    job = jobs.submit("bad", BETA="3")
    assert slurm.ended(job) == "FAILED"
    assert slurm.show(job)["ExitCode"] == "2:0"
    said = [line for line in jobs.said("bad").splitlines() if line.startswith("opd: ")]
    assert said == ["opd: method.beta=3: must be less than or equal to 1"]


def test_a_task_for_each_rank_is_refused_with_the_remedy(jobs, slurm):
    job = jobs.submit("many", more=("hardware.nodes=1",))
    assert slurm.ended(job) == "FAILED"
    (line,) = [line for line in jobs.said("many").splitlines() if line.startswith("opd: ")]
    assert line.startswith("opd: hardware=cpu_2rank: 1 x 2 processes, and srun started this command 2 times"), line
    assert line.endswith("srun --nodes=1 --ntasks-per-node=1")
