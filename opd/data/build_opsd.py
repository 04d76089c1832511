"""Build the dataset of method opsd from a table of drafts, checks and fixes.

    python -m opd.data.build_opsd --system_prompt_path system.txt --source_csv export.csv --output_dir data/opsd

A row of the CSV is one task: what is asked, a chain of turns about it (a draft, what a checker said of it, the fix,
what a judge said of that, ...) and the answers these led to. The student sees what is asked and learns an answer; the
teacher sees the chain as well. Three files are written, one JSON object a line, in the order of the table:

    opsd_student_messages.jsonl     id, messages (system, input, answer)
    opsd_teacher_messages.jsonl     id, messages (system, input, chain)
    opsd_combined_messages.jsonl    id, messages (system, input, answer), privileged_messages (chain),
                                    teacher_messages (system, input, chain)

The combined file is what opsd trains on; the student file is data for sft.

The answer is the first of target_columns that is filled. The chain is read in its order and ends before the first
empty cell; an optional cell may be empty. --include_final_assistant adds final_column to a chain that reached its end.
Cells are read as text and lose the white space at both ends; an empty one, or nan, none or null in any case, is missing
("NA" is text). Rows without input, then rows without an answer, are skipped. The counts are printed; warnings (empty
privileged_messages, repeated or missing ids) go to stderr.

Files are UTF-8, with or without a byte order mark. Outputs appear whole or not at all. Exit code: 0; 2 for input that
cannot be used, told in one line; 1 where writing failed.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from opd.config import did_you_mean
from opd.data.columns import row_refusal
from opd.data.opsd_rows import Columns, OpsdRows, Stage, opsd_rows
from opd.data.readers import Row, read_rows
from opd.errors import ConfigError, OpdError, RunError

OUTPUTS = ("student", "teacher", "combined")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # column names on a terminal that is not UTF-8
    flags = _parser().parse_args(arguments)
    try:
        outputs = {name: _output(flags, name) for name in OUTPUTS}
        built = _build(flags, outputs)
        _write(outputs, built)
    except OpdError as error:
        sys.stderr.write(f"build_opsd: {error}\n")
        return error.exit_code
    except OSError as error:  # a path that cannot even be asked about: too long, or in a folder that is closed
        sys.stderr.write(f"build_opsd: {error}\n")
        return ConfigError.exit_code
    for warning in _warnings(built):
        sys.stderr.write(f"warning: {warning}\n")
    sys.stdout.write(_report(built, outputs))
    return 0


def _parser() -> argparse.ArgumentParser:
    default = yaml.safe_dump(Columns().model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=110)
    parser = argparse.ArgumentParser(
        prog="python -m opd.data.build_opsd",
        description=__doc__,
        epilog=f"--columns without a file, to copy and change (a key left out keeps its default):\n\n{default}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--system_prompt_path", type=Path, required=True, metavar="TXT", help="system prompt of every row")
    add("--source_csv", type=Path, required=True, metavar="CSV", help="the table; its first line names the columns")
    add(
        "--output_dir", type=Path, default=Path(), metavar="DIR", help="folder of the three outputs (default: this one)"
    )
    for name in OUTPUTS:
        text = f"this output elsewhere (default: DIR/{_file_name(name)})"
        add(f"--{name}_out", type=Path, metavar="JSONL", help=text)
    add("--overwrite", action="store_true", help="replace outputs that exist; without it they are refused")
    text = "end whole chains with final_column: the teacher then reads that text too"
    add("--include_final_assistant", action="store_true", help=text)
    add("--columns", type=Path, metavar="YAML", help="YAML or JSON file that names the columns, see below")
    add("--id_column", metavar="NAME", help="over --columns; '' for a table without ids (each id is then null)")
    add("--input_column", metavar="NAME", help="over --columns")
    add("--target_columns", nargs="+", metavar="NAME", help="over --columns; best answer first")
    return parser


def _file_name(output: str) -> str:
    return f"opsd_{output}_messages.jsonl"


def _output(flags: argparse.Namespace, name: str) -> Path:
    path: Path = getattr(flags, f"{name}_out") or flags.output_dir / _file_name(name)
    # A link is followed, so that what it points to is replaced and not the link.
    path = path.resolve()
    place = f"--{name}_out={path}"
    if path.exists() and not path.is_file():
        raise row_refusal(place, "is not a regular file", "name a file")
    if path in (flags.source_csv.resolve(), flags.system_prompt_path.resolve()):
        raise row_refusal(place, "is an input of this command", "name another file")
    if path.exists() and not flags.overwrite:
        raise row_refusal(place, "exists", "add --overwrite to replace it, or name another file or --output_dir")
    return path


def _build(flags: argparse.Namespace, outputs: dict[str, Path]) -> OpsdRows:
    if len(set(outputs.values())) < len(outputs):
        problem = "two outputs are one file"
        raise row_refusal(", ".join(f"--{name}_out={path}" for name, path in outputs.items()), problem, "name three")
    columns = _columns(flags)
    system_prompt = _text(flags.system_prompt_path, "--system_prompt_path").strip()
    if not system_prompt:
        place = f"--system_prompt_path={flags.system_prompt_path}"
        raise row_refusal(place, "the system prompt is empty or white space", "write one")
    place = f"--source_csv={flags.source_csv}"
    if flags.source_csv.is_file() and flags.source_csv.suffix.lower() != ".csv":
        raise row_refusal(place, "not a .csv", "export the table as CSV (UTF-8)")
    rows = read_rows(flags.source_csv, limit=None, key="--source_csv")
    _check_columns(rows[0], columns.needed(flags.include_final_assistant), place)
    built = opsd_rows(rows, columns, system_prompt, include_final_assistant=flags.include_final_assistant)
    if not built.combined:
        reasons = f"{built.skipped_missing_input} without input, {built.skipped_missing_target} without an answer"
        raise row_refusal(place, f"none of {len(rows)} rows is kept ({reasons})", "check the columns named for both")
    return built


def _columns(flags: argparse.Namespace) -> Columns:
    place, named = "--columns", {}
    if flags.columns is not None:
        place = f"--columns={flags.columns}"
        try:
            named = yaml.safe_load(_text(flags.columns, "--columns"))
        except yaml.YAMLError as error:
            raise row_refusal(place, f"neither YAML nor JSON ({error})", "see --help for one to copy") from None
        if not isinstance(named, dict):
            problem = f"holds {type(named).__name__}, not keys and values"
            raise row_refusal(place, problem, "see --help for one to copy")
    for key in ("id_column", "input_column", "target_columns"):
        if getattr(flags, key) is not None:
            named = {**named, key: getattr(flags, key)}
    if named.get("id_column") == "":
        named = {**named, "id_column": None}
    try:
        return Columns.model_validate(named)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        remedy = "see --help for one to copy"
        if problem["type"] == "extra_forbidden":
            known = Columns if len(problem["loc"]) == 1 else Stage
            remedy = did_you_mean(str(problem["loc"][-1]), list(known.model_fields))
        value = "" if problem["type"] == "missing" else f"={problem['input']!r}"
        message = re.sub("^(Input|[A-Z][a-z]+) should", "must", problem["msg"])
        raise row_refusal(f"{place}: {key}{value}", message, remedy) from None


def _text(path: Path, flag: str) -> str:
    place = f"{flag}={path}"
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start})"
        raise row_refusal(place, problem, "save the file as UTF-8 (iconv can)") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise row_refusal(place, problem, f"check the path (looked from {Path.cwd()})") from None


def _check_columns(row: Row, needed: list[str], place: str) -> None:
    missing = [name for name in needed if name not in row.fields]
    if not missing:
        return
    close = {name: difflib.get_close_matches(name, row.fields, n=1) for name in missing}
    meant = ", ".join(f"{near[0]!r} for {name}" for name, near in close.items() if near)
    # Quoted, because a name may end in a space that nobody sees.
    problem = f"no column {', '.join(missing)}; columns found: {', '.join(map(repr, row.fields))}"
    problem += f" (did you mean {meant}?)" if meant else ""
    raise row_refusal(place, problem, "name yours in --columns (--help shows one)")


def _write(outputs: dict[str, Path], built: OpsdRows) -> None:
    """All three beside their places first, then into them: a full disk leaves what was there."""
    partials: dict[str, Path] = {}
    try:
        for name, path in outputs.items():
            partials[name] = _partial(path, f"--{name}_out={path}")
        for name, partial in partials.items():
            records: list[dict[str, Any]] = getattr(built, name)
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        for name, partial in partials.items():
            partial.replace(outputs[name])
    except OSError as error:
        raise RunError(f"{error.filename or 'outputs'}: cannot be written ({error.strerror})") from None
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _partial(path: Path, place: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        problem = f"cannot be made ({error.strerror}: {error.filename})"
        raise row_refusal(place, problem, "choose another folder or name") from None
    return partial


def _warnings(built: OpsdRows) -> list[str]:
    warnings, kept = [], len(built.combined)
    if built.empty_privileged:
        warnings.append(
            f"{len(built.empty_privileged)} of {kept} kept rows have empty privileged_messages: their teacher sees "
            f"no more than the student; rows {_first(built.empty_privileged)} of the table"
        )
    if built.duplicate_ids:
        rows = sum(built.duplicate_ids.values())
        ids = _first([f"{name} ({count} rows)" for name, count in built.duplicate_ids.items()])
        warnings.append(f"{rows} kept rows share {len(built.duplicate_ids)} ids, and all are written: {ids}")
    if built.missing_ids not in (0, kept):
        warnings.append(f"{built.missing_ids} of {kept} kept rows have no id; theirs is null")
    return warnings


def _first(values: list[Any], most: int = 5) -> str:
    listed = ", ".join(map(str, values[:most]))
    return f"{listed} and {len(values) - most} more" if len(values) > most else listed


def _report(built: OpsdRows, outputs: dict[str, Path]) -> str:
    counts = {
        "total_rows": built.total_rows,
        "kept_rows": len(built.combined),
        "skipped_missing_input": built.skipped_missing_input,
        "skipped_missing_target": built.skipped_missing_target,
        "empty_privileged": len(built.empty_privileged),
        "duplicate_ids": len(built.duplicate_ids),
        "missing_ids": built.missing_ids,
    }
    lines = [f"{name}: {count}" for name, count in counts.items()]
    lines += ["kept rows whose chain has:", *(f"  {name}: {count}" for name, count in built.stages.items())]
    lines += ["written:", *(f"  {name}: {path}" for name, path in outputs.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
