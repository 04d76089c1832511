"""The two ways a run ends early: what the user asked for cannot be done (2), or the doing failed (1)."""

from __future__ import annotations


class OpdError(Exception):
    """A failure told in one line; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(OpdError):
    """Bad configuration or data. The message names the key, the value and the remedy."""

    exit_code = 2


class RowError(ConfigError):
    """One row of the data cannot be read; data.bad_rows=drop leaves it out."""


class RunError(OpdError):
    """The run itself failed (full disk, diverged loss, lost rank); what was saved is still whole."""

    exit_code = 1
