"""The checks of mode=check, made before every training too: of the pair of models, of the data, of the gradient."""

from opd.errors import PreflightError
from opd.preflight.checks import Checks
from opd.preflight.findings import Finding

__all__ = ["Checks", "Finding", "PreflightError"]
