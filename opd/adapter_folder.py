"""What a folder that peft wrote says of its adapter. No torch here: config checks ask too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.errors import ConfigError


def adapter_settings(path: str, key: str) -> dict[str, Any] | None:
    """adapter_config.json of a folder; None if there is none. Raises ConfigError if it cannot be read."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        problem = f"its adapter_config.json is not a JSON object ({error})"
        raise ConfigError(f"{key}={path}: {problem}; give a complete folder") from None
