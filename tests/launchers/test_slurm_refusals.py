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
    ],
)
def test_what_no_job_can_be_made_of_is_refused(words, told, tmp_path):
    answer = call("method=gkd", "hydra/launcher=slurm", *words)
    assert answer.code == 2
    assert len(answer.lines) == 1 and told in answer.lines[0]
    assert not list(tmp_path.iterdir())
