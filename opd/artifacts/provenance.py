"""What a result rests on: code, versions, machine, seeds, and hashes of models and data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

SNAPSHOT = "snapshot.json"  # beside a copy of the package: what `code` said of the original
_PACKAGES = (
    "opd",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "pydantic",
)
# A larger file is known by its size and ends; hashing 60 GB of weights would take longer than many runs.
_WHOLE_FILE_BYTES = 2**30


def provenance(*, seed: int, models: dict[str, str | None], data: dict[str, str]) -> dict[str, Any]:
    """A nested dict, ready for JSON. Hashes are of local files; a hub id is its own address.

    `data`: files, folders and hub ids by the key that names each; data.path is called data.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, "-m", "opd", *sys.argv[1:]]),
        "code": code(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": _hardware(),
        "seeds": {"run.seed": seed},
        "hashes": {
            **{name: folder_hash(Path(path)) for name, path in models.items() if path},
            **{key.removesuffix(".path"): data_hash(Path(path)) for key, path in data.items()},
        },
    }


def file_hash(path: Path) -> str:
    """sha256 of a file; of its size, first and last MiB where it is over 1 GiB (prefix `ends:`)."""
    if not path.is_file():
        return "not a local file"
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
            return digest.hexdigest()
        digest.update(str(size).encode() + file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        digest.update(file.read())
    return "ends:" + digest.hexdigest()


def data_hash(path: Path) -> dict[str, str] | str:
    """sha256 of a file, or of every file of a folder by its name in it; for a hub id, a word that says so."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        named = {file.relative_to(path): file for file in files}
        hidden = {name for name in named if any(part.startswith(".") for part in name.parts)}
        return {name.as_posix(): file_hash(file) for name, file in named.items() if name not in hidden}
    return file_hash(path) if path.is_file() else "not a local file; see data.*.revision"


def folder_hash(path: Path) -> dict[str, str] | str:
    """File name -> hash, of what a model folder holds at its top; for a hub id, a word that says so."""
    if not path.is_dir():
        return "not a local folder; see model.*.revision"
    return {file.name: file_hash(file) for file in sorted(path.iterdir()) if file.is_file()}


def code() -> dict[str, Any]:
    """Git's commit of the package, and whether something was changed since; None where git does not know it."""
    snapshot = Path(__file__).resolve().parents[2] / SNAPSHOT
    if snapshot.is_file():
        return json.loads(snapshot.read_text(encoding="utf-8"))

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        commit, changes = None, None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import torch  # noqa: PLC0415  everything else here answers without it

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
    }
