"""The command line in this process: what `python -m opd …` answers, without paying its imports for every case."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Answer:
    """What a command left behind: its exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


def call(*words: str) -> Answer:
    """`opd.__main__.main()` with these words as its command line."""
    from hydra.core.global_hydra import GlobalHydra

    from opd.__main__ import main

    GlobalHydra.instance().clear()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["opd", *words]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    finally:
        sys.argv = argv
    return Answer(code, stdout.getvalue(), stderr.getvalue())


def shell(*words: str, cwd: Path | None = None, env: dict[str, str] | None = None, **settings: Any) -> Answer:
    """The real command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "opd", *words],
        cwd=cwd or ROOT,
        env={**ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **settings,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes (None: a folder), to see that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
