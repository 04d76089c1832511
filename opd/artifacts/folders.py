"""The one way in which a folder to write into is made, or refused."""

from __future__ import annotations

from pathlib import Path

from opd.errors import ConfigError


def make_folder(folder: Path, key: str) -> None:
    """Make it and its parents. `key`: the setting that says where. Raises ConfigError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot be made ({error.strerror}); choose another folder") from None
