"""What addresses are made of: digests of the project's own source, and of model folders and data files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("opd")

_PACKAGE = Path(__file__).resolve().parents[1]
_BLOCK = 2**20
# A file that changes again within the clock tick of its last change keeps its mtime.
_SETTLED_NS = 2 * 10**9
# Neither model nor data: checkpoints, the state of optimizers and schedulers, hidden files, the store's own labels.
_FOLDERS_LEFT_OUT = re.compile(r"\..*|checkpoint-.*|global_step\d+")
_FILES_LEFT_OUT = re.compile(r"\..*|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|artifact\.json|used")


def source_version(paths: Iterable[str]) -> str:
    """A digest of these files and folders of the `opd` package ("trainer.py", "objectives"): names and .py text.

    Nothing is imported. The order of `paths` does not matter. Raises ValueError for a path that holds no source.
    """
    files: set[Path] = set()
    for path in paths:
        place = _PACKAGE / path
        found = set(place.rglob("*.py")) if place.is_dir() else {place}
        if not found or not all(file.suffix == ".py" and file.is_file() for file in found):
            raise ValueError(f"source_version: {path}: no Python source of that name in {_PACKAGE}")
        files |= found
    named = ((file.relative_to(_PACKAGE).as_posix(), hashlib.blake2b(file.read_bytes()).digest()) for file in files)
    return _combined(named)


def content_digest(path: Path, cache: Path) -> str:
    """A digest of a file's bytes, or of a folder's files with their names (a file's own name does not count).

    Left out of a folder: checkpoints, optimizer state, hidden files, artifact.json. `cache` is a JSON file of digests
    by path, size and mtime, so that weights are read once. An adapter counts with the base model that it names, where
    that is a folder. Raises FileNotFoundError where nothing lies at `path`.
    """
    known = _read(cache)
    fresh: dict[str, list[Any]] = {}

    def digest(file: Path) -> str:
        key, state, begun = str(file.resolve()), _state(file), time.time_ns()
        entry = known.get(key)
        if isinstance(entry, list) and len(entry) == 3 and entry[:2] == state:
            return entry[2]
        value = _of_file(file)
        if _state(file) == state and begun - state[1] > _SETTLED_NS:
            fresh[key] = [*state, value]
        return value

    if path.is_dir():
        named = [(file.relative_to(path).as_posix(), digest(file).encode()) for file in _files(path)]
        if (base := _base_of_adapter(path)) is not None:
            named += [(f"base/{file.relative_to(base).as_posix()}", digest(file).encode()) for file in _files(base)]
        result = _combined(named)
    else:
        result = digest(path)
    if fresh:
        _remember(cache, fresh)
    return result


def _state(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def _files(folder: Path) -> Iterator[Path]:
    # Links are followed: a folder of the hub's cache holds nothing else.
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _FOLDERS_LEFT_OUT.fullmatch(name)]
        files = [Path(where, name) for name in names if not _FILES_LEFT_OUT.fullmatch(name)]
        yield from (file for file in files if file.is_file())


def _base_of_adapter(folder: Path) -> Path | None:
    base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    return Path(base) if base and Path(base).is_dir() else None


def _combined(named: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(named):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _of_file(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(cache: Path, fresh: dict[str, list[Any]]) -> None:
    """Add to the cache. Of two writers at once the later one wins whole; what the other knew is read again some day."""
    kept = {file: entry for file, entry in _read(cache).items() if Path(file).exists()}
    partial = cache.with_name(f".{cache.name}.{secrets.token_hex(4)}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(kept | fresh, indent=1), encoding="utf-8")
        partial.replace(cache)
    except OSError as error:
        log.warning("%s: digests are not kept (%s); large files are read again next time", cache, error.strerror)
