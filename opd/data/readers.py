"""Files on disk -> rows. What is wrong with a file is refused in one line, before a weight is loaded."""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from opd.errors import ConfigError

# (number, fields); fields None stands for a blank line, which is no row but is counted.
_Numbered = tuple[int, "dict[str, Any] | None"]


@dataclass(frozen=True)
class Row:
    """One row of a file.

    `number` counts from 1: the line in .jsonl and .txt, the object in .json, the row in .parquet and in .csv,
    whose header is not counted.
    """

    number: int
    fields: dict[str, Any]


class Rows(list[Row]):
    """The rows of a file in its order; `blank_lines` were skipped on the way."""

    blank_lines: int = 0


def read_rows(path: Path, *, limit: int | None, key: str = "data.path") -> Rows:
    """The rows of a .json, .jsonl, .csv, .parquet or .txt file: the first `limit` (1 or more), or all.

    `iterate_rows` says how they are read. Raises ConfigError, in one line.
    """
    rows = Rows()
    for row in first_rows(iterate_rows(path, key=key), limit):
        if row is None:
            rows.blank_lines += 1
        else:
            rows.append(row)
    return rows


def iterate_rows(path: Path, *, key: str = "data.path") -> Iterator[Row | None]:
    """The rows of a file, each read when it is asked for (of a .json all at once); None stands for a blank line.

    Text is UTF-8, with or without a byte order mark. Cells of a .csv are strings ("007" stays "007"); a line
    of a .txt is {"prompt": line}. `key` is the config key that named the file. Raises ConfigError, in one
    line, for what is wrong with it and for a file without a row.
    """
    path, is_empty = Path(path), True
    try:
        _check_readable(path, key)
        for number, fields in _READERS[path.suffix.lower()](path, key):
            is_empty = is_empty and fields is None
            yield None if fields is None else Row(number, fields)
    except UnicodeDecodeError as error:
        line = _first_line_that_is_not_utf8(path)
        raise _refusal(key, path, f"line {line} is not UTF-8", "save the file as UTF-8 (iconv can)") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise _refusal(key, path, f"cannot be read ({reason})", "check the path and its permissions") from error
    if is_empty:
        raise _refusal(key, path, "the file has no rows", "give a file with at least one")


def first_rows(rows: Iterable[Row | None], limit: int | None) -> Iterator[Row | None]:
    """The rows up to the `limit`-th (blank lines do not count); nothing behind it is read."""
    taken = 0
    for row in rows:
        yield row
        taken += row is not None
        if taken == limit:
            return


def _refusal(key: str, path: Path, problem: str, remedy: str) -> ConfigError:
    # Names and values come from the user's files and may hold line breaks; a refusal is one line.
    return ConfigError(" ".join(f"{key}={path}: {problem}; {remedy}".split()))


def _check_readable(path: Path, key: str) -> None:
    known = ", ".join(_READERS)
    if path.is_dir():
        raise _refusal(key, path, "is a folder", f"name one file in it ({known})")
    if not path.exists():
        raise _refusal(key, path, "no such file", _where_it_may_be(path))
    if path.suffix.lower() in _UNFINISHED:
        raise _refusal(key, path, "a download that is not finished", "download it again")
    if path.suffix.lower() not in _READERS:
        ending = repr(path.suffix) if path.suffix else "no extension"
        raise _refusal(key, path, f"cannot tell the format from {ending}", f"convert or rename to one of {known}")
    if not path.is_file():
        raise _refusal(key, path, "is not a regular file", "write the rows to a file first")
    if path.stat().st_size == 0:
        raise _refusal(key, path, "the file is empty", "give a file with at least one row")


def _where_it_may_be(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either (looked from {Path.cwd()})"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"check the path (looked from {Path.cwd()})"


def _first_line_that_is_not_utf8(path: Path) -> int:
    with path.open("rb") as file:  # no UTF-8 sequence holds the byte of a line break, so lines decode alone
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _parsed(text: str, path: Path, key: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        remedy = "fix that line"
        if path.suffix.lower() == ".json" and error.msg == "Extra data":
            remedy = "one object per line is .jsonl: rename the file"
        raise _refusal(key, path, f"line {line}: not JSON ({error.msg})", remedy) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        problem = f"line {first_line}: JSON that cannot be read ({error})"
        raise _refusal(key, path, problem, "fix or remove it") from error


def _read_json(path: Path, key: str) -> Iterator[_Numbered]:
    document = _parsed(path.read_text(encoding="utf-8-sig"), path, key, first_line=1)
    if isinstance(document, dict):
        lists = {name: value for name, value in document.items() if isinstance(value, list)}
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            problem = f"an object must hold exactly one list of rows (found {found})"
            raise _refusal(key, path, problem, "keep one list, or write a list of objects")
        document = next(iter(lists.values()))
    if not isinstance(document, list):
        problem = f"holds {type(document).__name__}, not a list of objects"
        raise _refusal(key, path, problem, "write [{…}, {…}]")
    for number, fields in enumerate(document, start=1):
        yield number, _object(fields, f"row {number}", path, key)


def _read_jsonl(path: Path, key: str) -> Iterator[_Numbered]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                yield number, None
                continue
            fields = _parsed(line.strip(), path, key, first_line=number)
            yield number, _object(fields, f"line {number}", path, key)


def _object(fields: Any, place: str, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        problem = f"{place} is {type(fields).__name__}, not an object"
        raise _refusal(key, path, problem, 'write it as {"column": value}')
    return fields


def _read_csv(path: Path, key: str) -> Iterator[_Numbered]:
    # The csv module stops at 131,072 characters a cell, less than one long document.
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: without it an unclosed quote swallows the rest of the file into one cell, silently.
            reader = csv.reader(file, strict=True)
            header = _header(next((cells for cells in reader if cells), []), path, key)
            for cells in reader:
                if not cells:
                    yield number, None
                    continue
                number += 1
                if len(cells) != len(header):
                    place = f"row {number} (ends on line {reader.line_num})"
                    problem = f"{place} has {len(cells)} cells, the header {len(header)}"
                    raise _refusal(key, path, problem, "quote cells that hold commas or line breaks")
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problem = f"row {number + 1}: not CSV ({error})"
        raise _refusal(key, path, problem, "check its quotes (a quote inside a cell is doubled)") from error
    finally:
        csv.field_size_limit(previous_limit)


def _header(names: list[str], path: Path, key: str) -> list[str]:
    wrong = sorted({name or "(no name)" for name in names if not name or names.count(name) > 1})
    if wrong:
        problem = f"the header has unnamed or repeated columns: {', '.join(wrong)}"
        raise _refusal(key, path, problem, "give every column its own name")
    return names


def _read_parquet(path: Path, key: str) -> Iterator[_Numbered]:
    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        problem = f"not a whole parquet file ({error})"
        raise _refusal(key, path, problem, "download or write it again") from error


def _read_txt(path: Path, key: str) -> Iterator[_Numbered]:
    del key
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            yield number, ({"prompt": line.rstrip("\n")} if line.strip() else None)


_UNFINISHED = (".incomplete", ".part", ".crdownload")  # what the hub's client and browsers call them

_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
