"""An experiment tracker beside the run folder. The folder always holds everything; a tracker never stops a run."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

from opd.config import Config

log = logging.getLogger("opd")


class Tracker:
    """Weights & Biases, or nothing. A continued run continues its curve."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._run: Any = None
        if config.tracking.backend == "wandb":
            self._run = _start_wandb(config, folder)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of one step, under their own names."""
        if self._run is not None:
            self._run.log(metrics, step=step)

    def close(self, summary: dict[str, Any]) -> None:
        """The run's result, and its end."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()


def _start_wandb(config: Config, folder: Path) -> Any:
    import wandb  # noqa: PLC0415  more than a second that most runs do not need

    settings = config.tracking
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    common: dict[str, Any] = {
        "project": settings.project,
        "name": folder.name,
        "group": config.run.name,
        "tags": settings.tags,
        "dir": str(folder),
        "id": identity.read_text(encoding="utf-8"),
        "resume": "allow",
        "config": config.model_dump(mode="json"),
        "settings": wandb.Settings(silent=True),
    }
    try:
        return wandb.init(mode=settings.mode, **common)
    except wandb.Error as error:
        log.warning(
            "tracking.mode=%s: %s; the run is tracked offline (wandb sync uploads it later)", settings.mode, error
        )
        return wandb.init(mode="offline", **common)
