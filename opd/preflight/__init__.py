"""The checks of mode=check, made before every training too: of the pair of models, of the data, of the gradient."""

from opd.preflight.checks import Checks
from opd.preflight.findings import Finding, PreflightError

__all__ = ["Checks", "Finding", "PreflightError"]
