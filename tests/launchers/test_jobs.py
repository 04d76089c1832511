"""The jobs of a sweep before they begin: their folders, what they ask of Slurm, their code, and an end without a word."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from hydra_plugins.opd_launcher import _jobs, _queue, _snapshot, _submission
from omegaconf import OmegaConf

from opd.composition import CONF
from opd.errors import ConfigError
from opd.stages import check


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """The sweep's config, and its jobs as `opd -m WORDS` composes them, of these overrides each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))

    def compose(words, jobs, **settings):
        GlobalHydra.instance().clear()
        hydra = Hydra.create_main_hydra2("opd", create_config_search_path(str(CONF)))
        master = hydra.compose_config("config", words, RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=None)
        return master, _jobs.checked_jobs(context, master, jobs, 0, check=check, **settings)

    yield compose
    GlobalHydra.instance().clear()


GRID = [["method=gkd", f"method.beta={beta}"] for beta in (0, 0.5, 1)]


@pytest.mark.parametrize("words", [[], ["hydra.sweep.dir=swept/${now:%S}-${now:%f}"]])
def test_all_of_a_sweep_lies_in_one_folder_however_long_its_jobs_take_to_compose(composed, words):
    master, jobs = composed(words, GRID)
    folder = _jobs.begin_sweep(master).absolute()
    assert [job.folder for job in jobs] == [folder / str(number) for number in range(3)]
    assert Path(OmegaConf.load(folder / "multirun.yaml").hydra.sweep.dir).absolute() == folder


def test_sweeps_that_begin_in_the_same_second_have_different_folders(composed):
    master, _ = composed([], GRID[:1])
    assert datetime.strptime(Path(master.hydra.sweep.dir).name, "%Y-%m-%d_%H-%M-%S-%f")


def test_a_folder_of_the_sweep_that_differs_from_job_to_job_is_refused(composed):
    with pytest.raises(
        ConfigError,
        match=r"^job 1 \(run.seed=1\): hydra.sweep.dir=seed1: another job has seed0, and a sweep has one folder",
    ):
        composed(["hydra.sweep.dir=seed${run.seed}"], [["run.seed=0"], ["run.seed=1"]])


def test_the_name_of_a_requeued_job_stands_for_every_part_of_the_time(composed):
    master, jobs = composed(["hydra.sweep.dir='${now:%Y}/${run.seed}_${now:%f}'"], GRID, name="slurm-27.0")
    assert master.hydra.sweep.dir == "slurm-27.0/0_slurm-27.0"
    assert [job.folder for job in jobs] == [Path("slurm-27.0/0_slurm-27.0").absolute() / str(n) for n in range(3)]


def test_a_run_submitted_from_within_a_job_has_a_folder_of_its_own(composed, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "27", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    folders = {composed([], [["method=gkd"]], mode=RunMode.RUN)[1][0].folder for _ in range(2)}
    assert len(folders) == 2 and not any("slurm" in str(folder) for folder in folders)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], {"requeue": True}),
        (["hydra.launcher.additional_parameters={hold: true}"], {"requeue": True, "hold": True}),
        (["hydra.launcher.additional_parameters={no-requeue: true}"], {"no-requeue": True}),
    ],
)
def test_a_job_asks_to_be_requeued_unless_told_otherwise(composed, words, asked):
    _, jobs = composed(["hydra/launcher=slurm", *words], [["method=gkd"]])
    ((parameters, _),) = _submission.by_resources(jobs)
    assert parameters["additional_parameters"] == asked


def test_commands_that_copy_the_same_code_at_once_share_the_copy(tmp_path):
    together = threading.Barrier(3)

    def take():
        together.wait()
        return _snapshot.take_snapshot(tmp_path / "logs")

    with ThreadPoolExecutor(3) as pool:
        places = [future.result() for future in [pool.submit(take) for _ in range(3)]]
    assert list((tmp_path / "logs").iterdir()) == [places[0]] and len(set(places)) == 1
    assert (places[0] / "opd/stages.py").read_bytes() == (Path(CONF).parent / "opd/stages.py").read_bytes()


@pytest.mark.parametrize(
    ("state", "log", "said"),
    [
        ("CANCELLED", None, "cancelled before it began"),
        ("NODE_FAIL", None, "ended without a word, and without a log (Slurm: NODE_FAIL)"),
        ("NODE_FAIL", "a last line", "ended without a word (Slurm: NODE_FAIL)"),
    ],
)
def test_a_job_without_a_word_is_told_with_its_log_once_and_only_if_there_is_one(composed, tmp_path, state, log, said):
    _, (job,) = composed([], [["method=gkd"]])
    one = _queue.Submitted(job, "12", tmp_path / "logs", state, ended_at=0)
    if log:
        one.folder.mkdir()
        one.log.write_text(f"{log}\n")
    end = _queue._silent_end(one, now=60)
    assert end is not None and (end.code, end.said) == (1, said)
    told = _queue._told(one, end)
    assert told.count(str(one.log)) == (1 if log else 0)
    assert said in told and (log or "") in told
