"""A copy of opd's code as it is at submission: a job may wait for days, and a checkout goes on changing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from uuid import uuid4

import opd
from opd.artifacts.provenance import SNAPSHOT, code
from opd.errors import ConfigError

_ROOT = Path(opd.__file__).resolve().parents[1]
_PARTS = ("opd", "launchers", "conf")


def checkout() -> Path | None:
    """Where opd's code lies if it can change under a waiting job; None where it is an installed wheel."""
    return _ROOT if (_ROOT / "pyproject.toml").is_file() else None


def take_snapshot(folder: Path) -> Path:
    """Copy the code into `folder`, under a digest of it, so that the same code lies there once. Raises ConfigError."""
    files = sorted(
        file
        for part in _PARTS
        for file in (_ROOT / part).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    place = folder / f"code-{digest.hexdigest()}"
    if place.is_dir():
        return place
    partial = folder / f".{place.name}.{uuid4().hex}"
    try:
        for file in files:
            copy = partial / file.relative_to(_ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        (partial / SNAPSHOT).write_text(json.dumps(code()) + "\n", encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        if not place.is_dir():  # or another command has copied the same code meanwhile
            raise ConfigError(
                f"{place}: the code could not be copied ({error.strerror}); choose another folder"
            ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place
