"""Things made once and used again, addressed by the content of what made them."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

log = logging.getLogger("opd")


def code_version(modules: Iterable[ModuleType]) -> str:
    """A digest of the source of these modules: the part of an address that changes when they do."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


class Store:
    """A folder of artefacts, each under `<kind>-<digest of its recipe>`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def address(self, kind: str, recipe: dict[str, Any]) -> Path:
        """Where the artefact of this recipe lies, or will lie."""
        text = json.dumps(recipe, sort_keys=True)
        return self._folder / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"

    def get_or_make(self, kind: str, recipe: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """The artefact's folder: made beside its place, moved there when whole. A second process waits."""
        place = self.address(kind, recipe)
        if place.is_dir():
            return place
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                partial = place.with_name(place.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                (partial / "recipe.json").write_text(json.dumps(recipe, indent=2), encoding="utf-8")
                partial.rename(place)
        return place
