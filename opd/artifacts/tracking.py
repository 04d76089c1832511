"""An experiment tracker beside the run folder. The folder always holds everything; a tracker never stops a run."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opd.config import Config

log = logging.getLogger("opd")
_CONNECTS = 30.0  # seconds that a run waits for the tracker's server, once
_UPLOADS = 120.0  # seconds that its end waits for what is not uploaded yet


class Tracker:
    """Weights & Biases, TensorBoard, or nothing. Its curves are those of metrics.jsonl.

    A continued run first tells the tracker the lines of metrics.jsonl that it does not have: what a kill kept from it,
    and what is made again after a checkpoint, is there once.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._backend: _Wandb | _TensorBoard | None = None
        self._name = config.tracking.backend
        kinds = {"wandb": _Wandb, "tensorboard": _TensorBoard}
        if self._name in kinds:
            with self._never_stopping():
                backend = self._backend = kinds[self._name](config, folder)
                for step, metrics in _recorded(folder / "metrics.jsonl"):
                    backend.record(step, metrics)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of one step, under their own names."""
        with self._never_stopping():
            if self._backend is not None:
                self._backend.record(step, metrics)

    def close(self, summary: dict[str, Any]) -> None:
        """The run's result, and its end."""
        with self._never_stopping():
            if self._backend is not None:
                self._backend.close(summary)

    @contextmanager
    def _never_stopping(self) -> Iterator[None]:
        """A tracker that fails is told of once, and left."""
        try:
            yield
        except Exception as error:
            if self._backend is not None:
                self._backend.leave()
            self._backend = None
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning("tracking=%s: failed (%s); the run goes on, and its folder holds everything", self._name, told)


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._run = _start_wandb(config, folder)
        self._next = self._run.step  # above 0 where the server has the run's earlier steps
        self._step, self._row = 0, {}

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Keep a step back until it is whole: half of it on the server could not be completed after a kill."""
        if step != self._step:
            self._send()
        self._step = step
        self._row |= metrics

    def _send(self) -> None:
        if self._row and self._step >= self._next:
            self._run.log(self._row, step=self._step)
        self._row = {}

    def close(self, summary: dict[str, Any]) -> None:
        self._send()
        self._run.summary.update(summary)
        self._run.finish()

    def leave(self) -> None:
        """Give its service up, which may be gone: or Python says so at its own end, in a traceback."""
        import wandb  # noqa: PLC0415

        with suppress(Exception):
            wandb.teardown()


def _start_wandb(config: Config, folder: Path) -> Any:
    import wandb  # noqa: PLC0415  more than a second that most runs do not need

    settings = config.tracking
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    common: dict[str, Any] = {
        "project": settings.project,
        "name": settings.name or folder.name,
        "group": config.run.name,
        "tags": settings.tags,
        "dir": str(folder),
        "id": identity.read_text(encoding="utf-8"),
        "resume": "allow",
        "config": config.model_dump(mode="json"),
        "settings": wandb.Settings(silent=True, init_timeout=_CONNECTS, finish_timeout=_UPLOADS),
    }
    if settings.mode != "online":
        return wandb.init(mode=settings.mode, **common)
    try:
        # Asked for first: wandb.init would wait at a prompt for someone to type a key.
        if wandb.login(prompt=False, verify=False):
            return wandb.init(mode="online", **common)
        reason = "no API key (wandb login)"
    except Exception as error:
        reason = " ".join(str(error).split())
        wandb.teardown()  # its service would go on holding the run's id
    log.warning("tracking.mode=online: %s; the run is tracked offline, and wandb sync uploads it later", reason)
    return wandb.init(mode="offline", **common)


class _TensorBoard:
    """Event files in the run folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  it is an extra

        place = folder / "tensorboard"
        # The curve is written anew: TensorBoard drops from step 0 on what stands in files before this one.
        self._writer = SummaryWriter(str(place), purge_step=0 if place.is_dir() else None)
        self._writer.add_text("config", f"```json\n{config.model_dump_json(indent=2)}\n```", 0)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """One scalar a metric, single precision."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, summary: dict[str, Any]) -> None:
        self._writer.add_text("result", f"```json\n{json.dumps(summary, indent=2)}\n```", 0)
        self._writer.close()

    def leave(self) -> None:
        """Nothing: it holds a file, of which no more is asked."""


def _recorded(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each line; NaN and infinities stand there as strings."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
            metrics = json.loads(line)
            yield int(metrics.pop("step")), {name: float(value) for name, value in metrics.items()}
