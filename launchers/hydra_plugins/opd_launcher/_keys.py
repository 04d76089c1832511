"""What kind of value each key of hydra.launcher takes: a text where a list stands would be a list of its letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opd.errors import ConfigError


def check_keys(asked: dict[str, Any]) -> None:
    """Raise ConfigError with a line for each key that holds another kind of value."""
    refused = [
        f"hydra.launcher.{key}={asked[key]}: must be {kind}"
        for kind, (is_right, keys) in _KINDS.items()
        for key in keys
        if not is_right(asked[key])
    ]
    if refused:
        raise ConfigError("\n".join(refused))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_plain(value: Any) -> bool:
    """A text, or a number, which is as good a text."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(each is True or _is_plain(each) for each in value.values())


# By how the kind is told: what tells it, and the keys.
_KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "true or false": (lambda value: isinstance(value, bool), ("wait", "exclusive")),
    "a whole number, 1 or more": (
        lambda value: _is_whole(value, 1),
        ("timeout_min", "signal_delay_s", "array_parallelism"),
    ),
    "a whole number, 1 or more, or null": (lambda value: value is None or _is_whole(value, 1), ("cpus_per_task",)),
    "a whole number, 0 or more, or null": (lambda value: value is None or _is_whole(value, 0), ("mem_gb",)),
    "a whole number, 0 or more, or a text as a100:2, or null": (
        lambda value: value is None or isinstance(value, str) or _is_whole(value, 0),
        ("gpus_per_node",),
    ),
    "one text, or null": (
        lambda value: value is None or _is_plain(value),
        ("partition", "account", "qos", "constraint", "exclude", "gres", "name", "comment"),
    ),
    'a list of texts, as ["export A=1"]': (_is_list, ("setup", "srun_args")),
    "null, or as {mail-type: END, hold: true}: of each option its text, or true": (
        lambda value: value is None or _is_mapping(value),
        ("additional_parameters",),
    ),
}
