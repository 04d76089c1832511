"""Signals that ask a run to end soon: in a Slurm job SIGUSR2 and SIGTERM (its time is nearly over, or it is preempted).

Between the first step and the last they are noted, and answered at the end of a step, by all ranks together, with a
checkpoint; anywhere else there is nothing to save, and the process ends at once. No torch here: a process that starts
ranks hears them too, and passes them on: they may have come to it alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from opd import slurm
from opd.background import repeated

log = logging.getLogger("opd")

_LISTENS = ".pid"  # ending of the empty file by which a rank says that it hears signals
INTERRUPTED = 85  # exit code in a Slurm job: interrupted, and what was worth it saved; outside of one 128 + signal


class _Heard:
    """The signal that came, and whether somebody asks for it at a better moment."""

    number: int | None = None
    deferred = False


def signals() -> tuple[signal.Signals, ...]:
    """What is heard here."""
    return (signal.SIGUSR2, signal.SIGTERM) if slurm.in_job() else (signal.SIGTERM,)


@contextmanager
def handled() -> Iterator[None]:
    """Hear the signals in the body; the handlers of before, which may be another launcher's, come back after it."""
    with restored(*signals()):
        listen()
        try:
            yield
        finally:
            _Heard.deferred = False


def listen() -> None:
    """Hear the signals from now on."""
    _Heard.number, _Heard.deferred = None, False
    for each in signals():
        signal.signal(each, _hear)


def listens(folder: Path) -> None:
    """Say that this rank hears the signals."""
    (folder / f"{os.getpid()}{_LISTENS}").touch()


def passed_on(folder: Path) -> AbstractContextManager[None]:
    """What this process hears in the body, each rank that says in `folder` that it listens hears too."""
    told = set[str]()

    def pass_on(_is_left: threading.Event) -> None:
        if (number := _Heard.number) is None:
            return
        for process in {file.stem for file in folder.rglob(f"*{_LISTENS}")} - told:
            told.add(process)
            with suppress(ProcessLookupError):
                os.kill(int(process), number)

    return repeated(pass_on, seconds=0.2)


@contextmanager
def restored(*numbers: signal.Signals) -> Iterator[None]:
    """The body may set other handlers for these signals."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """In the body a signal is only noted."""
    defer(True)
    try:
        yield
    finally:
        defer(False)


def defer(waits: bool) -> None:
    """Whether a signal is only noted from now on."""
    _Heard.deferred = waits


def requested() -> bool:
    """Whether a signal has come."""
    return _Heard.number is not None


def leave() -> NoReturn:
    """End this process as interrupted. A KeyboardInterrupt it is not: that says that somebody sits there."""
    defer(True)  # a second signal would cut short what ends here
    raise SystemExit(INTERRUPTED if slurm.in_job() else 128 + (_Heard.number or signal.SIGTERM))


def leave_if_requested() -> None:
    """End here if a signal came while nobody could answer it."""
    if requested():
        leave()


def is_exit_code(code: int) -> bool:
    """Whether a process of ours that ended so was interrupted; negative: by a signal that it could not hear yet."""
    return code in (INTERRUPTED, 128 + signal.SIGTERM, -signal.SIGUSR2, -signal.SIGTERM)


@contextmanager
def requeued() -> Iterator[None]:
    """Where the body is interrupted in a Slurm job, the job comes back by itself, unless it was cancelled.

    Around a whole command, once: a job that was requeued is told so, and cannot be a second time.
    """
    try:
        yield
    except SystemExit as error:
        if error.code == INTERRUPTED and slurm.in_job():
            _say(f"interrupted; {slurm.requeue()}")
        elif error.code == 128 + signal.SIGTERM:
            _say("interrupted; the same command with the same run.dir continues")
        raise


def _say(line: str) -> None:
    """Into the run's log too, where it has begun."""
    if log.handlers:
        log.info(line)
    else:
        sys.stderr.write(f"opd: {line}\n")


def _hear(number: int, _frame: Any) -> None:
    _Heard.number = number
    if not _Heard.deferred:
        leave()
