"""hydra/launcher=slurm on a real Slurm of this machine: what is submitted, what comes back, and what is told of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from contract.command import SMALL, write_inputs
from contract.variants import PLACEHOLDER

from slurm.cluster import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def opd(slurm, inputs, tmp_path):
    """The command with `hydra/launcher=slurm` and tiny models, and the output of both its streams."""

    def run(*words, cwd=tmp_path, root=ROOT, start=subprocess.run):
        small = [word.replace(PLACEHOLDER, f"{inputs}/") for word in SMALL]
        own = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        words = [*words, "hydra/launcher=slurm", "hydra.launcher.timeout_min=20"]
        words += [word for word in small if word.partition("=")[0] not in {own.partition("=")[0] for own in words}]
        command = [sys.executable, "-m", "opd", *words]
        own |= {"OPD_ARTIFACTS": str(tmp_path / "artifacts"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return start(command, cwd=cwd, env={**slurm.env, **own}, **streams)

    return run


def ids(output):
    """Slurm's ids by job number, as the launcher tells them."""
    return {
        int(number): slurm_id for number, slurm_id in re.findall(r"^  job (\d+) \(([\d_]+)\)", output, re.MULTILINE)
    }


def crashing(student, folder):
    """A copy of the student whose code raises on rank 3."""
    shutil.copytree(student, folder)
    code = """
        import os
        from transformers import LlamaForCausalLM

        class Crashing(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                if os.environ.get("RANK") == "3":
                    raise ValueError("boom in the model")
                return super().forward(*args, **kwargs)
    """
    (folder / "modeling_crashing.py").write_text(textwrap.dedent(code))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Crashing"], "auto_map": {"AutoModelForCausalLM": "modeling_crashing.Crashing"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_grid_is_one_array_can_be_compared_and_is_not_run_twice(slurm, opd, tmp_path):
    words = ("-m", "method=gkd", "method.beta=0,0.5,1", "method.lmbda=0,0.5,1", "train.max_steps=1")
    first = opd(*words, "hydra.sweep.dir=grid")
    assert first.returncode == 0, first.stdout
    jobs = ids(first.stdout)
    assert len(jobs) == 9 and len({one.partition("_")[0] for one in jobs.values()}) == 1
    assert {slurm.ended(one) for one in jobs.values()} == {"COMPLETED"}
    asked = {(beta, lmbda) for beta in ("0.0", "0.5", "1.0") for lmbda in ("0.0", "0.5", "1.0")}
    found = {
        tuple(
            re.search(rf"^  {key}: (\S+)", (tmp_path / f"grid/{n}/config.yaml").read_text(), re.M)[1]
            for key in ("beta", "lmbda")
        )
        for n in jobs
    }
    assert found == asked
    compared = subprocess.run(
        [sys.executable, "-m", "opd.compare", tmp_path / "grid", "--out", tmp_path / "compared"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.returncode == 0, compared.stderr
    again = opd(*words, "hydra.sweep.dir=grid")
    assert again.returncode == 0 and not ids(again.stdout)
    assert "finished before: 9" in again.stdout


def test_a_bad_value_is_refused_before_sbatch(slurm, opd, tmp_path):
    before = slurm.call("squeue", "-h", "-t", "all", "-o", "%i")
    answer = opd("-m", "method=gkd", "method.beta=0,0.5,3")
    assert answer.returncode == 2
    assert answer.stdout == "opd: job 2 (method.beta=3): method.beta=3: must be less than or equal to 1\n"
    assert slurm.call("squeue", "-h", "-t", "all", "-o", "%i") == before
    assert not list(tmp_path.iterdir())


def test_what_sbatch_refuses_leaves_nothing_behind(opd, tmp_path):
    answer = opd("method=sft", "hydra.launcher.partition=none", "run.dir=run")
    assert answer.returncode == 2
    assert "opd: hydra/launcher=slurm: sbatch: error: invalid partition specified: none" in answer.stdout
    assert not list(tmp_path.iterdir())


def test_jobs_of_two_shapes_are_two_arrays_and_a_crash_on_rank_3_is_told_as_such(slurm, opd, inputs, tmp_path):
    students = f"model.student.path={inputs}/student,{crashing(inputs / 'student', tmp_path / 'crashing')}"
    answer = opd(
        "-m", "method=sft", "hardware=cpu_2rank", "hardware.nodes=1,2", students, "train.max_steps=1",
        "model.student.trust_remote_code=true", "run.preflight=off", "hydra.sweep.dir=shapes",
    )  # fmt: skip
    assert answer.returncode == 1
    jobs = ids(answer.stdout)
    shown = {number: slurm.show(one) for number, one in jobs.items()}
    assert {number: one["NumNodes"] for number, one in shown.items()} == {0: "1", 1: "1", 2: "2", 3: "2"}
    assert len({one.partition("_")[0] for one in jobs.values()}) == 2
    states = {number: slurm.ended(one) for number, one in jobs.items()}
    assert states == {0: "COMPLETED", 1: "COMPLETED", 2: "COMPLETED", 3: "FAILED"}
    assert slurm.show(jobs[3])["ExitCode"] == "1:0"
    assert "ValueError: boom in the model" in answer.stdout
    assert "in forward" in answer.stdout and "Connection closed" not in answer.stdout
    assert answer.stdout.endswith("opd: 1 of 4 jobs failed\n")


def test_without_waiting_a_run_is_submitted_to_its_folder_with_the_gpus_of_its_hardware(slurm, opd, tmp_path):
    held = "hydra.launcher.additional_parameters={hold: true}"
    answer = opd(
        "method=sft", "hardware=a800x2", "train.batch_size=4", held, "hydra.launcher.wait=false", "run.dir=run",
        "hydra.launcher.mem_gb=1", "hydra.launcher.comment=a comment",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout
    (job,) = ids(answer.stdout).values()
    shown = slurm.show(job)
    assert shown["JobState"] == "PENDING" and "gpu:2" in shown["TresPerNode"]
    assert (shown["NumCPUs"], shown["NumTasks"], shown["MinMemoryNode"]) == ("16", "1", "1G")
    assert f"scancel {job}" in answer.stdout
    # This Slurm would requeue it anyway; another may be set up not to.
    assert "#SBATCH --requeue\n" in (tmp_path / f"run/.slurm/{job}/{job}_submission.sh").read_text()
    assert not (tmp_path / "outputs").exists()
    slurm.call("scancel", job)


def test_a_job_cancelled_while_it_waits_is_told_as_such_and_has_no_log(slurm, opd):
    waiting = opd(
        "method=sft", "hydra.launcher.additional_parameters={hold: true}", "run.dir=run", start=subprocess.Popen
    )
    lines = iter(waiting.stdout.readline, "")
    job = next(found[0] for line in lines if (found := list(ids(line).values())))
    slurm.call("scancel", job)
    rest = waiting.stdout.read()
    assert waiting.wait() == 1
    assert "failed (exit 1)\n    cancelled before it began\n" in rest and "its log" not in rest


def test_a_waiting_job_runs_the_code_of_its_submission(slurm, opd, tmp_path):
    copy = tmp_path / "checkout"
    for part in ("opd", "conf", "launchers"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    answer = opd(
        "method=sft", "hardware=cpu_2rank", "train.max_steps=1", "hydra.launcher.wait=false", "run.dir=run",
        "hydra.launcher.additional_parameters={hold: true}", cwd=copy, root=copy,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout
    assert f"{copy} is copied to {copy}/run/.slurm/code-" in answer.stdout
    for module in ("stages.py", "worker.py", "pipeline.py"):
        (copy / "opd" / module).write_text("raise RuntimeError('edited after submission')\n")
    (job,) = ids(answer.stdout).values()
    slurm.call("scontrol", "release", job)
    assert slurm.ended(job) == "COMPLETED", (copy / f"run/.slurm/{job}/{job}_0_log.out").read_text()
    assert "seconds" in json.loads((copy / "run/result.json").read_text())


def test_an_interrupted_run_comes_back_by_itself_and_is_no_failure(slurm, opd, tmp_path):
    waiting = opd("method=sft", "train.max_steps=400", "run.dir=run", start=subprocess.Popen)
    lines = iter(waiting.stdout.readline, "")
    job = next(found[0] for line in lines if (found := list(ids(line).values())))
    metrics = tmp_path / "run/metrics.jsonl"
    until(lambda: metrics.is_file() and '"step": 3,' in metrics.read_text(), seconds=200)
    slurm.call("scancel", "--signal=USR2", job)
    rest = waiting.stdout.read()
    assert waiting.wait() == 0, rest
    assert slurm.show(job)["Restarts"] == "1" and slurm.ended(job) == "COMPLETED"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    trained = [step for step in steps if step]
    assert sorted(set(trained)) == list(range(1, 401))
