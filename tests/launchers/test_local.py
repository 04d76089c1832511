"""hydra/launcher=local: a sweep on this machine, through the command itself, in this process."""

from __future__ import annotations

import re
import shutil

import pytest
from contract.command import SMALL, write_inputs
from contract.variants import PLACEHOLDER
from e2e.command import call

from opd.artifacts.comparison import compare


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def sweep(inputs, tmp_path, monkeypatch):
    """`opd -m …` in an empty folder, with tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))
    small = [word.replace(PLACEHOLDER, f"{inputs}/") for word in SMALL]

    def run(*words):
        own = {word.partition("=")[0] for word in words}
        return call("-m", *words, *(word for word in small if word.partition("=")[0] not in own))

    return run


def test_a_bad_value_refuses_the_whole_sweep_with_a_line_for_each_bad_job(sweep, tmp_path):
    answer = sweep("method=gkd,sft", "method.beta=0,3", "method.seq_kd=false")
    assert answer.code == 2
    assert answer.lines[0] == "opd: job 1 (method=gkd method.beta=3): method.beta=3: must be less than or equal to 1"
    # sft has no beta, so that Hydra cannot even compose it
    assert [
        re.match(r"opd: job (\d) \(method=sft method.beta=\d\): method.beta: unknown key; ", line)[1]
        for line in answer.lines[1:]
    ] == ["2", "3"]
    assert not list(tmp_path.iterdir())


def test_what_this_machine_does_not_have_refuses_the_sweep(sweep, tmp_path):
    answer = sweep("method=sft", "hardware=cpu_tiny,cpu_2rank", "hardware.nodes=1,2")
    assert answer.code == 2
    assert len(answer.lines) == 2 and all("hardware.nodes=2" in line for line in answer.lines)
    assert not list(tmp_path.iterdir())


def test_two_jobs_in_one_folder_are_refused(sweep, tmp_path):
    answer = sweep("method=sft", "run.seed=0,1", "run.dir=same")
    assert answer.code == 2
    assert answer.lines == [
        "opd: run.dir=same: 2 jobs would write there; leave run.dir out, and each has a folder of its own"
    ]
    assert not list(tmp_path.iterdir())


def torn(student, folder):
    """A copy of the student that cannot be loaded: a job fails as it begins."""
    shutil.copytree(student, folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    return folder


def test_a_sweep_of_a_requeued_slurm_job_has_its_folder_again_and_another_sweep_of_that_step_its_own(
    sweep, inputs, tmp_path, monkeypatch
):
    for name, value in {"SLURM_JOB_ID": "27", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    words = ("method=sft", f"model.student.path={torn(inputs / 'student', tmp_path / 'broken')}")
    for seeds in ("0,1", "0,1", "2,3"):
        assert sweep(*words, f"run.seed={seeds}").lines[-1] == "opd: 2 of 2 jobs failed"
    folders = list((tmp_path / "outputs/multirun").iterdir())
    assert len(folders) == 2 and all(re.fullmatch(r"slurm-27\.0-[0-9a-f]{6}", folder.name) for folder in folders)


def test_a_failing_job_stops_no_other_and_the_same_sweep_again_does_what_is_left(sweep, inputs, tmp_path):
    broken = torn(inputs / "student", tmp_path / "broken")
    students = f"model.student.path={inputs}/student,{broken},{inputs}/dpo_teacher"
    words = ("method=sft", students, "train.max_steps=1", "hydra.sweep.dir=swept")
    first = sweep(*words)
    assert first.code == 1
    assert first.lines[-1] == "opd: 1 of 3 jobs failed"
    told = [re.split(r"  +", line.strip()) for line in first.stdout.partition("jobs in swept\n")[2].splitlines()[:3]]
    assert [(line[0], line[-1].partition(":")[0]) for line in told] == [
        ("0", "finished"),
        ("1", "failed (exit 2)"),
        ("2", "finished"),
    ]
    assert f"model.student.path={broken}: " in told[1][-1]

    shutil.copy(inputs / "student/model.safetensors", broken)
    before = (tmp_path / "swept/0/metrics.jsonl").stat().st_mtime_ns
    again = sweep(*words)
    assert again.code == 0, again.stderr
    assert again.stdout.count("finished before\n") == 4  # as its turn comes, and in the table
    assert (tmp_path / "swept/0/metrics.jsonl").stat().st_mtime_ns == before
    compared = compare([tmp_path / "swept"], baseline=None, metrics=[], group_by=[])
    assert all(name in compared.text for name in ("student", "broken", "dpo_teacher"))
