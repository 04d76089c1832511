"""Student and teacher as a pair: do they read and write the same?"""

from __future__ import annotations

from opd.config import Config
from opd.loading import Readers
from opd.preflight.findings import Finding
from opd.protocols import Method


def check_pair(config: Config, method: Method, readers: Readers) -> list[Finding]:
    """Tokenizers, vocabularies, ends, templates and thinking mode of the run's models."""
    del config, method, readers
    return []
