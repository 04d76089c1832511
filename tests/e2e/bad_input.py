"""What the tests of bad input share: a run that would go well, for one thing about it to be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e2e.command import call, snapshot
from e2e.model_folders import file_run

Case = tuple[tuple[str, ...], tuple[str, ...]]
"""(further words of the command, what its one line has to name)."""


def names(lines: list[str], expected: list[tuple[str, ...]]) -> None:
    """Every line is one problem's, and names what it should."""
    assert len(lines) == len(expected), lines
    for line, parts in zip(lines, expected, strict=True):
        assert line.startswith("opd: ")
        missing = [part for part in parts if part not in line]
        assert not missing, f"{missing} not in {line!r}"


class Place:
    """A student, a teacher and rows that would run, for one thing about them to be broken."""

    def __init__(self, folder: Path, student: Path, teacher: Path, rows: Path) -> None:
        self.folder, self.student, self.teacher, self.rows = folder, student, teacher, rows
        self.run = folder / "run"

    def words(self, *more: str) -> list[str]:
        return file_run(self.run, self.rows, self.student, self.teacher, *more)

    def copy_student(self) -> Path:
        self.student = Path(shutil.copytree(self.student, self.folder / "student"))
        return self.student

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def write_rows(self, *rows: dict[str, Any]) -> None:
        """Nineteen rows that can be read, and these."""
        good = [{"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."} for n in range(19)]
        if any("chosen" in row for row in rows):
            good = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No idea."} for row in good]
        self.rows = self.write("bad.jsonl", "".join(json.dumps(row) + "\n" for row in (*good, *rows)))

    def edit(self, name: str, **values: Any) -> None:
        """Other values in a .json file of the student's."""
        file = self.student / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def is_refused(place: Place, more: Iterable[str], parts: tuple[str, ...]) -> None:
    """Exit code 2, one line that names these, nothing written and nothing written over."""
    before = snapshot(place.folder)
    answer = call(*place.words(*more))
    assert answer.code == 2, answer.stderr
    names(answer.lines, [parts])
    assert snapshot(place.folder) == before
