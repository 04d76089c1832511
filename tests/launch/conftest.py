"""Two tiny models, rows, and the words of a run of theirs."""

from __future__ import annotations

import pytest
from e2e.conftest import rows, student, teacher  # noqa: F401  fixtures


@pytest.fixture
def words(student, teacher, rows):  # noqa: F811
    """The words of a short run in this folder, which writes a line of metrics a step."""
    from launch.commands import words_of

    return lambda folder, *more: words_of(folder, student, teacher, rows, *more)
