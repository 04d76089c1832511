"""run.dir in a Slurm job: the requeued job has to find what it began, and no other command's."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write

from opd.composition import CONF, plain

TWO_TIMES = "run.dir='outputs/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}'"


@pytest.fixture
def folder(monkeypatch):
    """The run.dir of a command in a job, each time as another process would compose it."""
    for name in ("STEP_ID", "PTY_PORT", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_TASK_PID", "1")

    def of(*words: str, submitted: bool = False) -> str:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=list(words), return_hydra_config=True)
        with read_write(composed.hydra), open_dict(composed.hydra):
            composed.hydra.mode = "RUN"
            composed.hydra.runtime.output_dir = "."
        HydraConfig.instance().set_config(composed)
        own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
        return plain(own, submitted=submitted)["run"]["dir"]

    return of


@pytest.mark.parametrize("words", [(), (TWO_TIMES,)], ids=["default", "two times"])
@pytest.mark.parametrize("step", ["3", None])
def test_a_job_that_comes_back_finds_its_folder(words, step, folder, monkeypatch):
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    first = folder(*words)
    assert first == folder(*words)
    assert f"slurm-12.{step or 'batch'}-" in first
    assert "20" not in first.replace(first.rpartition("-")[2], ""), first  # no date is left


def test_commands_of_one_step_have_folders_of_their_own(folder, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert folder("run.seed=1") != folder("run.seed=2")


def test_a_named_folder_is_taken_as_it_is(folder):
    assert folder("run.dir=outputs/mine") == "outputs/mine"


def test_what_is_submitted_from_inside_of_a_job_is_not_called_after_that_job(folder):
    assert "slurm" not in folder(submitted=True)


def test_what_somebody_types_in_an_interactive_job_does_not_come_back(folder, monkeypatch):
    monkeypatch.delenv("SLURM_TASK_PID")  # salloc
    assert "slurm" not in folder()
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # srun --pty
    monkeypatch.setenv("SLURM_PTY_PORT", "1")
    assert "slurm" not in folder()
