"""Commands that start ranks: their words, a fault in one rank, what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from contract.command import fingerprint as fingerprint  # of the weights in final_model
from e2e.command import ENVIRONMENT
from e2e.model_folders import file_run

# The interpreter imports them at its start, in every process of the command. What happens is a bug in one rank.
_EARLY = """
import os
import sys

if os.environ.get("RANK") == "{rank}" and any("opd.worker" in word for word in sys.orig_argv):
    os.kill(os.getpid(), 9)
"""
_FAULT = """
import os

if str(os.environ.get("RANK")) == "{rank}":
    from opd.window import WindowBuilder

    whole = WindowBuilder.__call__

    def faulty(self, step):
        if step == {step}:
            {fault}
        return whole(self, step)

    WindowBuilder.__call__ = faulty
"""


def words_of(folder: Path, student: Path, teacher: Path, rows: Path, *more: str) -> list[str]:
    """Rollouts of a few tokens, every step logged, no evaluation that costs."""
    own = ("run.preflight=off", "evaluation.sampled=false", "evaluation.divergence=false", "train.log_every_steps=1")
    return file_run(folder, rows, student, teacher, *own, "train.micro_batch_size=1", *more)


def faulty(folder: Path, *, rank: int | None, fault: str, step: int = 1) -> dict[str, str]:
    """The environment in which this happens at the beginning of a step of one rank; None: of the only process."""
    (folder / "fault").mkdir()
    (folder / "fault" / "sitecustomize.py").write_text(_FAULT.format(rank=rank, fault=fault, step=step))
    return {"PYTHONPATH": f"{folder / 'fault'}:{ENVIRONMENT['PYTHONPATH']}"}


def killed_at_its_start(folder: Path, *, rank: int) -> dict[str, str]:
    """The environment in which this rank never gets as far as importing opd."""
    (folder / "fault").mkdir()
    (folder / "fault" / "sitecustomize.py").write_text(_EARLY.format(rank=rank))
    return {"PYTHONPATH": f"{folder / 'fault'}:{ENVIRONMENT['PYTHONPATH']}"}


HOLD = "import time; from opd import interruption\n" + " " * 12 + "while not interruption.requested(): time.sleep(0.05)"
"""A fault that waits for a signal: what interrupts the run then comes in this very step."""


def begin(*words: Any, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`python -m …`, in a process group of its own as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        env={**ENVIRONMENT, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 280) -> tuple[int, str]:
    """Its exit code and all that it said."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def losses(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str] | None = None, seconds: float = 240) -> None:
    """Until this step is logged."""
    end = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").is_file() or not any(
        f'"step": {step},' in line for line in (folder / "metrics.jsonl").read_text().splitlines()
    ):
        assert time.monotonic() < end, "the step is not reached"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its ranks that run."""
    return [child for child in psutil.Process(process.pid).children() if "opd.worker" in " ".join(child.cmdline())]
