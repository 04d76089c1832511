"""Trackers beside the run folder: their curves are those of metrics.jsonl, and nothing about them stops a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contract.command import logged, start, words_of, write_inputs
from contract.variants import DEFAULTS, needs_of
from launch.commands import begin, faulty, finish
from wandb_file import read_history, read_run, read_summary

from opd.artifacts.tracking import Tracker
from opd.conditions import validated

SAMPLING = next(variant for variant in DEFAULTS if needs_of(variant).rollouts)
STEPS, EVERY = 9, 4
TIMES = (f"train.max_steps={STEPS}", f"train.save_every_steps={EVERY}", "train.eval_every_steps=3")
WANDB = ("tracking=wandb", "tracking.project=walks", "tracking.name=first", "tracking.tags=[tiny,cpu]")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No key of the machine's, and none in its .netrc."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def compose(*overrides: str):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        made = hydra_compose("config", overrides=["run.dir=unused", *overrides])
    return validated(OmegaConf.to_container(made, resolve=True))


def run(inputs, folder, *more):
    return start(words_of(SAMPLING, inputs, folder, *TIMES, *more), folder.with_suffix(".log"))


def kill_after(step, command, folder):
    deadline = time.monotonic() + 120
    while max((line["step"] for line in logged(folder)), default=0) < step:
        assert command.process.is_alive() and time.monotonic() < deadline, command.said[-3000:]
        time.sleep(0.002)
    command.kill()
    assert not (folder / "final_model").exists()


def told(folder) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step."""
    steps: dict[int, dict[str, float]] = {}
    for line in logged(folder):
        steps.setdefault(line.pop("step"), {}).update({name: float(value) for name, value in line.items()})
    return steps


def wandb_files(folder) -> list[Path]:
    """The newest session last."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)


def wandb_curve(file) -> dict[int, dict[str, float]]:
    rows = read_history(file)
    curve = {row["_step"]: {k: float(v) for k, v in row.items() if not k.startswith("_")} for row in rows}
    assert len(curve) == len(rows)  # a step is one row
    return curve


def tensorboard_curve(folder) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curve: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in curve.setdefault(event.step, {})  # a step is one point
            curve[event.step][name] = event.value
    return curve


def assert_same_in_single_precision(curve, expected):
    assert curve.keys() == expected.keys()
    for step, metrics in expected.items():
        assert curve[step] == pytest.approx(metrics, rel=1e-6, nan_ok=True)


def test_the_offline_file_of_wandb_holds_every_value_of_the_metrics_file(inputs, tmp_path):
    folder = tmp_path / "run"
    run(inputs, folder, *WANDB).finish()
    expected, (file,) = told(folder), wandb_files(folder)
    assert sorted(expected) == list(range(STEPS + 1))
    assert {name.split("/")[0] for metrics in expected.values() for name in metrics} >= {"train", "eval", "rollout"}
    assert wandb_curve(file) == expected
    named = read_run(file)
    assert (named.project, named.display_name, list(named.tags)) == ("walks", "first", ["tiny", "cpu"])
    assert named.run_id == (folder / "wandb_id").read_text()
    summary, result = read_summary(file), json.loads((folder / "result.json").read_text())
    assert summary["train_seconds"] == result["train_seconds"] and summary["after"] == result["after"]


def test_the_event_files_of_tensorboard_hold_every_value_of_the_metrics_file(inputs, tmp_path):
    folder = tmp_path / "run"
    run(inputs, folder, "tracking=tensorboard").finish()
    assert_same_in_single_precision(tensorboard_curve(folder), told(folder))


@pytest.mark.slow
def test_a_killed_run_continues_its_curve_whatever_the_tracker(inputs, tmp_path):
    """Killed between two checkpoints, so steps are made again; and tracked elsewhere in its second session."""
    folder = tmp_path / "run"
    kill_after(EVERY + 2, run(inputs, folder, *WANDB), folder)
    kill_after(STEPS - 2, run(inputs, folder, "tracking=tensorboard"), folder)
    run(inputs, folder, *WANDB).finish()
    files, expected = wandb_files(folder), told(folder)
    assert sorted(expected) == list(range(STEPS + 1))
    assert wandb_curve(files[-1]) == expected  # whatever the kill took from the first file, and tensorboard's session
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{read_run(files[-1]).run_id}"}


@pytest.mark.slow
def test_a_killed_run_continues_its_events(inputs, tmp_path):
    folder = tmp_path / "run"
    kill_after(EVERY + 2, run(inputs, folder, "tracking=tensorboard"), folder)
    run(inputs, folder, "tracking=tensorboard").finish()
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert_same_in_single_precision(tensorboard_curve(folder), told(folder))


def test_wandb_that_is_disabled_writes_nothing(inputs, tmp_path):
    folder = tmp_path / "run"
    run(inputs, folder, *WANDB, "tracking.mode=disabled").finish()
    assert not (folder / "wandb").exists() and sorted(told(folder)) == list(range(STEPS + 1))


@pytest.mark.slow
def test_online_without_a_key_is_offline_with_one_line(inputs, tmp_path):
    folder = tmp_path / "run"
    command = run(inputs, folder, *WANDB, "tracking.mode=online").finish()
    assert len([line for line in command.said.splitlines() if "tracking.mode=online: no API key" in line]) == 1
    (file,) = wandb_files(folder)
    assert wandb_curve(file) == told(folder)


@pytest.mark.slow
def test_online_without_a_key_asks_nobody_at_a_terminal(inputs, tmp_path):
    import pty

    folder = tmp_path / "run"
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "opd", *words_of(SAMPLING, inputs, folder, *TIMES, *WANDB, "tracking.mode=online")]
    done = subprocess.Popen(words, cwd=Path(__file__).parents[2], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the terminal is gone with the process
        pass
    assert done.wait(timeout=60) == 0, said.decode()
    assert b"no API key" in said and b"Enter your choice" not in said


@pytest.mark.slow
def test_online_without_a_network_is_offline_after_half_a_minute(inputs, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = tmp_path / "run"
    started = time.monotonic()
    tracker = Tracker(compose(*WANDB, "tracking.mode=online"), _made(folder))
    assert time.monotonic() - started < 45
    tracker.record(1, {"train/loss": 1.0})
    tracker.close({"seconds": 1.0})
    wandb.teardown()  # as at the end of a process: its service may write the last block after `close`
    (file,) = wandb_files(folder)
    assert wandb_curve(file) == {1: {"train/loss": 1.0}}


def test_a_tracker_whose_service_dies_is_left_with_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("opd.artifacts.tracking.log.propagate", True)
    tracker = Tracker(compose(*WANDB), _made(tmp_path / "run"))
    tracker.record(1, {"train/loss": 1.0})
    assert not said(caplog)
    children = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
    (service,) = [line for line in children.splitlines() if "wandb-core" in line and f"--pid {os.getpid()}" in line]
    os.kill(int(service.split()[0]), signal.SIGKILL)
    time.sleep(0.5)
    for step in (2, 3, 4):
        tracker.record(step, {"train/loss": 1.0})
    tracker.close({"seconds": 1.0})
    (line,) = said(caplog)
    assert line.startswith("tracking=wandb: failed (") and "the run goes on" in line


SERVICE_DIES = """
            import psutil
            [child.kill() for child in psutil.Process().children() if "wandb-core" in child.name()]"""


@pytest.mark.slow
def test_a_run_whose_tracker_dies_ends_well_and_says_no_more_of_it(inputs, tmp_path):
    words = words_of(SAMPLING, inputs, tmp_path / "run", *TIMES, *WANDB)
    code, lines = finish(begin("opd", *words, env=faulty(tmp_path, rank=None, fault=SERVICE_DIES, step=3)))
    assert code == 0, lines
    assert lines.count("tracking=wandb: failed (") == 1 and "Traceback" not in lines, lines


def test_a_folder_that_no_tracker_can_write_to_costs_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("opd.artifacts.tracking.log.propagate", True)
    folder = _made(tmp_path / "run")
    (folder / "tensorboard").write_text("a file where the events should be")
    tracker = Tracker(compose("tracking=tensorboard"), folder)
    tracker.record(1, {"train/loss": 1.0})
    tracker.close({})
    (line,) = said(caplog)
    assert line.startswith("tracking=tensorboard: failed (")


def said(caplog) -> list[str]:
    # An earlier test may have left this handler on the logger too, which then holds each record twice.
    records = {id(record): record for record in caplog.records if record.name == "opd"}
    return [record.getMessage() for record in records.values()]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
