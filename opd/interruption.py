"""Signals that ask a run to end soon: in a Slurm job SIGUSR2 and SIGTERM (its time is nearly over, or it is preempted).

Between the first step and the last they are noted, and answered at the end of a step, by all ranks together, with a
checkpoint; anywhere else there is nothing to save, and the process ends at once. No torch here: a process that starts
ranks hears them too.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from opd import slurm

log = logging.getLogger("opd")

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
    """Where the body is interrupted in a Slurm job, the job comes back by itself, unless it was cancelled."""
    try:
        yield
    except SystemExit as error:
        if error.code == INTERRUPTED and slurm.in_job():
            log.info("interrupted; %s", slurm.requeue())
        raise


def _hear(number: int, _frame: Any) -> None:
    _Heard.number = number
    if not _Heard.deferred:
        leave()
