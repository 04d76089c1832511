"""What a Slurm job of the launcher runs, on each of its nodes. Hydra has no part in it: the config is composed.

No opd here before the snapshot of the code is on the path.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def run(raw: dict[str, Any], words: list[str], environment: dict[str, str], snapshot: str | None) -> None:
    """Run the config; Slurm sees the exit code of the run. Submitit's function of the job.

    `words`: the job's overrides, for its provenance. `environment`: hydra.job.env_set. `snapshot`: the code to run.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):  # submitit's own would requeue at once, with nothing saved
        signal.signal(number, signal.SIG_IGN)
    if snapshot is not None:
        sys.path.insert(0, snapshot)  # before the working folder, which may be the checkout
    os.environ.update(environment)
    sys.argv = ["opd", *words]

    from opd import interruption
    from opd.launch import is_follower, together

    with interruption.handled():
        if is_follower():
            sys.exit(together(lambda: 0))
        with interruption.requeued():
            sys.exit(together(lambda: _lead(raw)))


def _lead(raw: dict[str, Any]) -> int:
    """Run it; its exit code. How it ended is written for the launcher, unless it was interrupted and will go on."""
    from opd.artifacts.console import start_logging
    from opd.errors import FinishedError, OpdError
    from opd.stages import run

    start_logging()
    started, code, said, trace = time.perf_counter(), 0, "", ""
    try:
        run(raw)
    except FinishedError:  # requeued between its last line and its end
        pass
    except OpdError as error:
        code, said, trace = error.exit_code, str(error), error.trace
    except SystemExit as error:
        if error.code not in (1, 2, 3):
            raise
        code, said = error.code, "its log says why"
    except Exception as error:
        code, said, trace = 1, f"{type(error).__name__}: {error}", traceback.format_exc()
        sys.stderr.write(trace)
    sys.stderr.write("".join(f"opd: {line}\n" for line in said.splitlines()))
    _write({"code": code, "said": said, "trace": trace, "seconds": time.perf_counter() - started})
    return code


def _write(outcome: dict[str, Any]) -> None:
    import submitit

    file = outcome_file(submitit.JobEnvironment().paths.folder)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(file)


def outcome_file(folder: Path) -> Path:
    """Where the job whose logs lie in `folder` says how it ended."""
    return folder / "outcome.json"
