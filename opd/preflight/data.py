"""The rows as training will see them."""

from __future__ import annotations

from opd.config import Config
from opd.loading import Texts
from opd.preflight.findings import Finding
from opd.protocols import Method


def check_data(config: Config, method: Method, texts: Texts) -> list[Finding]:
    """Duplicates, lengths, open turns, and rows that stand on both sides of the split."""
    del config, method, texts
    return []
