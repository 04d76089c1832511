"""Folders that a config names: one to write into is made, or refused; one of kept scores is known from a model's."""

from __future__ import annotations

from pathlib import Path

from opd.errors import ConfigError

SCORES = "scores.json"  # what a folder of kept scores has, and none of a model


def make_folder(folder: Path, key: str) -> None:
    """Make it and its parents. `key`: the setting that says where. Raises ConfigError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot be made ({error.strerror}); choose another folder") from None


def holds_scores(folder: str | None) -> bool:
    """Whether what teachers said lies there (mode=scores), rather than a model."""
    return folder is not None and (Path(folder) / SCORES).is_file()
