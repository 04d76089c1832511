"""What a check found, how it is told, and when it stops a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opd.errors import PreflightError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    `check`: its name, "pair.tokenizer". An "error" makes the result of a training worthless, a "warning" may; a "note"
    is worth knowing. `what` names key and value where there is one, `why` says why it matters, `remedy` what to change.
    """

    check: str
    severity: Severity
    what: str
    why: str = ""
    remedy: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        parts = [f"{self.severity} {self.check}: {self.what}", self.why, self.remedy]
        return " ".join("; ".join(part for part in parts if part).split())

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Those that stop a training."""
    return [finding for finding in findings if finding.severity == "error"]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise PreflightError if there is an error among them."""
    if errors := errors_of(findings):
        raise PreflightError("\n".join(finding.line for finding in errors))
