"""How a rank ended that did not end well: it writes it down, and the process that started it finds which came first."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from opd import interruption
from opd.errors import ConfigError, OpdError, PreflightError, RunError

log = logging.getLogger("opd")

FILE = "error.json"
_PATIENCE = 30  # seconds, of torch elastic
GONE = 87  # exit code of a rank that ended because another had failed
_ERRORS = {error.exit_code: error for error in (RunError, ConfigError, PreflightError)}
# What a rank says when another one has left it, by gloo and by NCCL.
_LEFT_ALONE = re.compile(
    "connection (was )?(closed|reset)|broken pipe|remote process exited|ncclremoteerror|communicator was aborted|"
    "recvbytes|recvvalue|failed to recv|socket",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The end of a rank. `message` is the error's, `trace` is empty where it says all; `exit_code` < 0: of a signal."""

    rank: int
    host: str
    exit_code: int
    message: str
    trace: str
    seconds: float
    output: str

    @property
    def order(self) -> tuple[int, float]:
        """The least of several is the cause."""
        if self.exit_code in (GONE, -signal.SIGTERM):
            return 3, self.seconds
        if self.exit_code > 0 and self.trace and _LEFT_ALONE.search(self.message):
            return 2, self.seconds
        return int(self.exit_code < 0), self.seconds

    @property
    def may_follow(self) -> bool:
        """Whether the end of another rank explains it. It does not where the kernel killed this one."""
        return self.order[0] >= 2

    def tell(self) -> NoReturn:
        """Raise what the rank raised; of an error that nobody foresaw its traceback goes to stderr first."""
        where = f"rank {self.rank} on {self.host}"
        if self.trace:
            sys.stderr.write(self.trace)
            error = RunError(f"{where} failed: {self.message.splitlines()[0]}; its output: {self.output}")
            error.trace = self.trace
            raise error
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            why = " (the kernel does so when memory is short)" if name == "SIGKILL" else ""
            raise RunError(f"{where} was ended by {name}{why}; its output: {self.output}")
        raise _ERRORS.get(self.exit_code, RunError)(
            self.message or f"{where} ended with exit code {self.exit_code}; its output: {self.output}"
        )


@contextmanager
def recorded() -> Iterator[None]:
    """The body of a rank: what it raises is written to $TORCHELASTIC_ERROR_FILE and becomes its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except OpdError as error:
        interruption.defer(True)  # until it is written
        _write(error.exit_code, str(error), "")
        sys.exit(error.exit_code)
    except Exception as error:
        interruption.defer(True)
        trace = traceback.format_exc()
        if int(os.environ["RANK"]):  # of rank 0 it goes to the console, and only if it is what failed first
            sys.stderr.write(trace)
        _write(1, f"{type(error).__name__}: {error}", trace)
        sys.exit(1)


def _write(exit_code: int, message: str, trace: str) -> None:
    # message and timestamp are what torch reads there too.
    seconds = time.time()
    told = {"message": message, "timestamp": int(seconds), "seconds": seconds, "exit_code": exit_code, "trace": trace}
    place = {"rank": int(os.environ["RANK"]), "host": socket.gethostname()}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({**told, **place}), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a process ended: their failures, and whether one of them left early, as a signal asks for.

    `interrupted`: whether a signal came to the process itself. Without one, who started a rank has ended it.
    """

    failures: list[Failure]
    left_early: bool
    interrupted: bool

    @property
    def is_good(self) -> bool:
        """Whether all of them did all of their work."""
        return not self.failures and not self.left_early

    def dumped(self) -> str:
        """As text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def loaded(cls, text: str) -> Outcome:
        """What `dumped` made a text of."""
        told = json.loads(text)
        return cls([Failure(**failure) for failure in told.pop("failures")], **told)


def own_ends(ends: Mapping[int, tuple[int, float]]) -> dict[int, int]:
    """Exit codes by rank, of exit codes and the seconds in which torch elastic found them.

    After the first end it sends SIGTERM to the other ranks, and SIGKILL to those that are there 30 s later, which is
    not a rank's own end either.
    """
    first = min((seconds for _, seconds in ends.values()), default=0.0)
    return {
        rank: -signal.SIGTERM if code == -signal.SIGKILL and seconds - first > _PATIENCE / 2 else code
        for rank, (code, seconds) in ends.items()
    }


def outcome(folder: Path, exit_codes: dict[int, int]) -> Outcome:
    """What becomes of ranks that wrote below this folder, those that ended badly by rank with their exit codes."""
    failures = []
    for file in folder.rglob(FILE):
        told = json.loads(file.read_text(encoding="utf-8"))
        del told["timestamp"]
        failures.append(Failure(**told, output=str(file.parent)))
    said = {failure.rank for failure in failures}
    early = {rank for rank, code in exit_codes.items() if interruption.is_exit_code(code)}
    for rank in sorted(exit_codes.keys() - said - early):
        failures.append(Failure(rank, socket.gethostname(), exit_codes[rank], "", "", time.time(), str(folder)))
    return Outcome(failures, left_early=bool(early), interrupted=interruption.requested())


def conclude(outcomes: Iterable[Outcome]) -> None:
    """Raise what ended the ranks of all processes, if something did."""
    outcomes = list(outcomes)
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    # Clocks of machines differ, so what can only follow from something else comes last.
    cause = min(failures, key=lambda failure: failure.order, default=None)
    if cause is not None:
        if not (cause.may_follow and any(outcome.interrupted for outcome in outcomes)):
            cause.tell()
        log.info("rank %d on %s was left alone: %s", cause.rank, cause.host, cause.message.partition("\n")[0])
    if not all(outcome.is_good for outcome in outcomes):
        interruption.leave()
