"""What a run of Weights & Biases wrote: its .wandb file, a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER = 32768, 7  # bytes; the file begins with a header of its own, of 7 bytes too
_FULL, _FIRST, _LAST = 1, 2, 4


def read_records(file: Path) -> Iterator[bytes]:
    """The records of the log; a last one that a kill cut short is left out."""
    data, place, whole = file.read_bytes(), _HEADER, b""
    assert data[:4] == b":W&B"
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # what is left of a block is too small for a header
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (_FULL, _FIRST) else whole + part
        if kind in (_FULL, _LAST):
            yield whole


def read_history(file: Path) -> list[dict]:
    """The rows in their order, with "_step"."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in read_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return rows


def read_run(file: Path):
    """The record that names the run: id, project, name, tags."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = (Record.FromString(data) for data in read_records(file))
    return next(record.run for record in records if record.WhichOneof("record_type") == "run")


def read_summary(file: Path) -> dict:
    """The last value of every key of the summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    told = {}
    for data in read_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                told[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return told
