"""hydra/launcher=slurm where there is nothing to submit to, or nothing to submit."""

from __future__ import annotations

import pytest
from e2e.command import call


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("words", [["method=gkd"], ["-m", "method.beta=0,1"]])
def test_a_machine_without_slurm_is_told(words, tmp_path):
    answer = call(*words, "hydra/launcher=slurm")
    assert answer.code == 2
    assert answer.lines == [
        "opd: hydra/launcher=slurm: no sbatch, srun, squeue on the PATH here; submit from a machine of the cluster, or "
        "leave it out to run on this one"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hardware.device=auto"], "what auto stands for on the job's machine is not known here"),
        (["hydra.launcher.timeout_min=24:00:00"], "hydra.launcher.timeout_min=24:00:00: must be a whole number"),
        (["hydra.launcher.timeout_min=5"], "hydra.launcher.signal_delay_s=300: not less than the time limit"),
        (["hydra.launcher.time=5"], "hydra.launcher.time: unknown key"),
        (["hydra.launcher.wiat=false"], "hydra.launcher.wiat: unknown key; did you mean hydra.launcher.wait?"),
        (["hydra.launcher.wait=no"], "hydra.launcher.wait=no: must be true or false"),
        (["hydra.launcher.array_parallelism=true"], "array_parallelism=True: must be a whole number, 1 or more"),
        (["hydra.launcher.setup='export A=1'"], 'setup=export A=1: must be a list of texts, as ["export A=1"]'),
        (["hydra.launcher.srun_args='--cpu-bind=none'"], "srun_args=--cpu-bind=none: must be a list of texts"),
        (["hydra.launcher.partition=[a,b]"], "hydra.launcher.partition=['a', 'b']: must be one text, or null"),
        (["hydra.launcher.mem_gb=16GB"], "hydra.launcher.mem_gb=16GB: must be a whole number, 0 or more, or null"),
        (["hydra.launcher.additional_parameters=hold"], "additional_parameters=hold: must be null, or as {"),
        (["run.dir=run_%j"], "run.dir=run_%j: Slurm puts something else for a % in the path of its logs"),
    ],
)
def test_what_no_job_can_be_made_of_is_refused(words, told, tmp_path):
    answer = call("method=gkd", "hydra/launcher=slurm", *words)
    assert answer.code == 2
    assert len(answer.lines) == 1 and told in answer.lines[0]
    assert not list(tmp_path.iterdir())


def test_each_key_of_another_kind_has_a_line():
    answer = call("method=gkd", "hydra/launcher=slurm", "hydra.launcher.exclusive=yes", "hydra.launcher.setup=ls")
    assert answer.code == 2
    assert [line.partition("=")[0] for line in answer.lines] == [
        "opd: hydra.launcher.exclusive",
        "opd: hydra.launcher.setup",
    ]
