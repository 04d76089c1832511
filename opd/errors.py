"""How a run ends early: what the user asked for cannot be done (2), its checks found an error (3), or it failed (1)."""

from __future__ import annotations

import re


class OpdError(Exception):
    """A failure told in one line. `exit_code` is the process's; `trace` a failed rank's traceback, or empty."""

    exit_code = 1
    trace = ""


class ConfigError(OpdError):
    """Bad configuration or data. The message names the key, the value and the remedy."""

    exit_code = 2


class RowError(ConfigError):
    """One row of the data cannot be read; data.bad_rows=drop leaves it out."""


class FinishedError(ConfigError):
    """run.dir holds this very run, and it came to its end: there is nothing left to do."""


class PreflightError(OpdError):
    """The checks found an error; the message is the list, one line each."""

    exit_code = 3


class RunError(OpdError):
    """The run itself failed (full disk, diverged loss, lost rank); what was saved is still whole."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left, in the words of torch, CUDA, MPS, safetensors or Python."""
    told = re.search("out of memory|allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    return not isinstance(error, OpdError) and (isinstance(error, MemoryError) or told is not None)
