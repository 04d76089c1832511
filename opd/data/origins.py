"""Where rows come from: a file, a folder of dataset files, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd.config import Origin
from opd.data.hub import dataset_rows
from opd.data.readers import Row, first_rows, iterate_rows


def is_hub_id(path: str) -> bool:
    """Whether this names a data set on the hub; anything that looks like a place on a disk does not."""
    place = Path(path)
    looks_local = place.is_absolute() or path.startswith(".") or path.count("/") > 1
    return not (looks_local or place.suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt") or place.exists())


def rows_of(origin: Origin, prefix: str, *, limit: int | None = None, streaming: bool = False) -> Iterator[Row | None]:
    """The rows in their order, each read when it is asked for; None stands for a blank line.

    `prefix` and a name make a key of the origin's ("data.", "data.sources.chat.", "data.eval_"). `streaming`: a hub
    data set is not downloaded first. Raises ConfigError, in one line.
    """
    assert origin.path is not None
    path = Path(origin.path)
    if path.is_dir() or is_hub_id(origin.path):
        return dataset_rows(origin, prefix, limit=limit, streaming=streaming)
    return first_rows(iterate_rows(path, key=f"{prefix}path"), limit)


def name_of(origin: Origin, prefix: str) -> str:
    """How refusals call it: "data.path=rows.jsonl", or with the split of a data set."""
    assert origin.path is not None
    is_set = Path(origin.path).is_dir() or is_hub_id(origin.path)
    return f"{prefix}path={origin.path}" + (f" {prefix}split={origin.split}" if is_set else "")


def columns_of(origin: Origin) -> dict[str, str]:
    """Our columns that it names otherwise."""
    return {ours: theirs for ours, theirs in origin.columns.items() if theirs is not None}
