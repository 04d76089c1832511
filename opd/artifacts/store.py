"""Things made once and used again, addressed by the content of what made them.

In the store's folder, for each artefact: `<kind>-<digest>/`, whole, with artifact.json (what made it) and `used` (its
mtime is the last use); or `<kind>-<digest>.partial/`, and `<kind>-<digest>.making.json`, who makes it. A `.lock` is
held while it is made or removed, and stays: unlinking it would let two processes hold it at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from opd import __version__
from opd.artifacts import digests
from opd.artifacts.digests import source_version as source_version  # the other half of a recipe
from opd.artifacts.folders import make_folder

log = logging.getLogger("opd")

LABEL = "artifact.json"
USED = "used"
PARTIAL = ".partial"
_MAKING = ".making.json"
_LOCK = ".lock"
_REMOVED = ".removed-"  # on its way out; what a killed removal leaves goes with the next
_NAME = re.compile(r"(?P<kind>.+)-[0-9a-f]{12}(?P<partial>\.partial)?")


@dataclass(frozen=True)
class Artifact:
    """What lies at one address. `label` is its artifact.json, {} if that cannot be read.

    Of a partial one it is what its maker noted at the start: kind, recipe, inputs, command, pid, host, started.
    """

    path: Path
    kind: str
    partial: bool
    label: dict[str, Any]

    @property
    def name(self) -> str:
        """`<kind>-<digest>`, of a partial one too."""
        return self.path.name.removesuffix(PARTIAL)

    @property
    def inputs(self) -> list[str]:
        """Names of the artefacts it was made from, and absolute paths of what lies outside the store."""
        return self.label.get("inputs", [])

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk now."""
        return folder_bytes(self.path)

    @property
    def last_used(self) -> float:
        """When it was last made or found, or a partial one written to; seconds since the epoch."""
        if (self.path / USED).exists():
            return (self.path / USED).stat().st_mtime
        return max((state.st_mtime for state in _states(self.path)), default=0.0)


class Store:
    """A folder of artefacts, each under `<kind>-<digest of its recipe>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, kind: str, recipe: dict[str, Any]) -> Path:
        """Where the artefact of this recipe lies, or will lie."""
        text = json.dumps(recipe, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"

    def find(self, kind: str, recipe: dict[str, Any]) -> Path | None:
        """The whole artefact of this recipe, noted as used now; None where there is none."""
        place = self.address(kind, recipe)
        if not place.is_dir():
            return None
        try:
            (place / USED).touch()
        except FileNotFoundError:  # it is being removed
            return None
        except OSError as error:  # a store of someone else's
            log.debug("%s: last use is not noted (%s)", place.name, error.strerror)
        return place

    def get_or_make(
        self,
        kind: str,
        recipe: dict[str, Any],
        make: Callable[[Path], None],
        *,
        inputs: Sequence[Path] = (),
        resumable: bool = False,
    ) -> Path:
        """The artefact's folder: made beside its place, moved there when whole. A second process waits for the first.

        `make` gets an empty folder; with `resumable`, what a killed predecessor left, which may be all of it.
        """
        if found := self.find(kind, recipe):
            return found
        place = self.address(kind, recipe)
        make_folder(self.folder, key=f"artifacts.dir={self.folder}")
        with self._acquire(place.name):
            if self.find(kind, recipe) is None:
                label = {"kind": kind, "recipe": recipe, "inputs": [self._input(path) for path in inputs]}
                self._make(place, label, make, resumable)
        return place

    def content_digest(self, path: Path) -> str:
        """A digest of a model folder or data file (see opd.artifacts.digests); kept here, so read once."""
        return digests.content_digest(path, self.folder / "digests.json")

    def artifacts(self) -> list[Artifact]:
        """Everything kept here, by name. Folders that no store named are not among it."""
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        found = [(path, _NAME.fullmatch(path.name)) for path in entries if path.is_dir()]
        return [Artifact(path, name["kind"], bool(name["partial"]), self._label(path)) for path, name in found if name]

    def maker(self, name: str) -> str | None:
        """'pid 12 on host' of the process that makes or removes this artefact now; None where nobody does."""
        if not (self.folder / f"{name}{_LOCK}").exists():
            return None
        try:
            self._lock(name).acquire(blocking=False).lock.release()
        except Timeout:
            return self._who(name)
        except PermissionError:  # a store of someone else's, where nothing can be made or removed from here
            return None
        return None

    def remove(self, artifact: Artifact) -> bool:
        """Delete it; False, and nothing happens, while another process makes or removes it, or if it has moved."""
        try:
            held = self._lock(artifact.name).acquire(blocking=False)
        except Timeout:
            return False
        with held:
            try:
                # In one step: at no moment is there half an artefact under its name.
                artifact.path.rename(self.folder / f"{_REMOVED}{secrets.token_hex(4)}")
            except FileNotFoundError:
                return False
            if artifact.partial:
                self._note(artifact.name).unlink(missing_ok=True)
        for removed in self.folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(removed, ignore_errors=True)
        return True

    def _make(self, place: Path, label: dict[str, Any], make: Callable[[Path], None], resumable: bool) -> None:
        partial = place.with_name(place.name + PARTIAL)
        label |= {"command": shlex.join(sys.argv), "opd_version": __version__}
        note = self._note(place.name)
        _write_json(note, {**label, "pid": os.getpid(), "host": socket.gethostname(), "started": _now()})
        # With a label it is whole: its maker was killed before it could move it.
        if not (partial / LABEL).is_file():
            if partial.exists() and not resumable:
                shutil.rmtree(partial)
            if partial.exists() and any(partial.iterdir()):
                log.info("%s: continues what an interrupted command left", place.name)
            partial.mkdir(exist_ok=True)
            started = time.monotonic()
            make(partial)
            cost = {"seconds": round(time.monotonic() - started, 3), "bytes": folder_bytes(partial)}
            _write_json(partial / LABEL, {**label, "created": _now(), **cost})
        (partial / USED).touch()
        note.unlink()
        partial.rename(place)

    def _acquire(self, name: str) -> AcquireReturnProxy:
        lock = self._lock(name)
        try:
            return lock.acquire(blocking=False)
        except Timeout:
            log.info("%s is being made by %s: waiting for it", name, self._who(name))
            return lock.acquire()

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name}{_LOCK}")

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}{_MAKING}"

    def _who(self, name: str) -> str:
        note = read_json(self._note(name))
        return f"pid {note['pid']} on {note['host']}" if {"pid", "host"} <= note.keys() else "another process"

    def _label(self, path: Path) -> dict[str, Any]:
        return read_json(path / LABEL) or read_json(self._note(path.name.removesuffix(PARTIAL)))

    def _input(self, path: Path) -> str:
        """The name of the artefact that holds this path, or the absolute path."""
        resolved, folder = path.resolve(), self.folder.resolve()
        inside = resolved != folder and resolved.is_relative_to(folder)
        return resolved.relative_to(folder).parts[0] if inside else str(resolved)


def folder_bytes(folder: Path) -> int:
    """Sizes of all files below; links are not followed."""
    return sum(state.st_size for state in _states(folder) if not stat.S_ISDIR(state.st_mode))


def _states(folder: Path) -> Iterator[os.stat_result]:
    """Of the folder and all that lies below, but for what another process takes away meanwhile."""
    for where, _, files in os.walk(folder):
        for place in (where, *(os.path.join(where, file) for file in files)):
            with suppress(FileNotFoundError):
                yield os.lstat(place)


def read_json(file: Path) -> dict[str, Any]:
    """What the file holds, {} where it is missing or holds something else than an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
