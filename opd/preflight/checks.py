"""The checks of one run, collected: what stops it, what is said, what is kept."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from opd import distributed
from opd.config import Config
from opd.errors import OpdError
from opd.preflight.findings import Finding, errors_of, refuse

log = logging.getLogger("opd")


class Checks:
    """Runs checks as `run.preflight` and the mode want them, and keeps what they find.

    mode=check goes on to the end of the list; a training with run.preflight=strict stops at `enforce`, with warn it
    never does, and with off no check is made.
    """

    def __init__(self, config: Config) -> None:
        self.findings: list[Finding] = []
        self._is_check = config.mode == "check"
        self._wanted = self._is_check or (config.mode == "train" and config.run.preflight != "off")
        self._strict = config.run.preflight == "strict"

    def __call__(self, check: Callable[[], Iterable[Finding]]) -> None:
        """Make a check, if any are wanted. Every rank makes it; what one found, all know."""
        if self._wanted:
            found = [finding for part in distributed.everyones(_made(check)) for finding in part]
            self.findings += dict.fromkeys(found)

    def enforce(self) -> None:
        """Before the next expensive thing: raise PreflightError if something stands against it."""
        if self._strict and not self._is_check:
            refuse(self.findings)

    def tell(self) -> None:
        """Say what there is to heed; in mode=check everything."""
        for finding in self.findings:
            if self._is_check or finding.severity != "note":
                log.log(logging.INFO if finding.severity == "note" else logging.WARNING, "%s", finding.line)

    def conclude(self) -> None:
        """The end of mode=check: its errors are raised."""
        if not errors_of(self.findings):
            log.info("mode=check: nothing stands against this training")
        refuse(self.findings)


def _made(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What the check finds, or that it broke off. Of several ranks one alone may not go on."""
    try:
        return list(check())
    except OpdError:
        raise
    except Exception as error:
        if distributed.world_size() > 1:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"broke off with {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        remedy = "if training runs with run.preflight=off, the check is wrong: report it"
        return [Finding("checks", "error", what, "what it looks for is not known", remedy)]
