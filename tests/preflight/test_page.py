"""docs/preflight.md names every check that exists, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = r"(?:pair|data|gradient)\.[a-z_]+"


def test_the_page_names_every_check_and_no_other():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "opd/preflight").glob("*.py"))
    made = set(re.findall(rf'"({NAME})"', code))
    page = (ROOT / "docs/preflight.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(rf"`({NAME})`", cell)}
    assert listed == made
    caught = [line.split(" | ")[1] for line in page.splitlines() if line.count(" | ") == 1 and "`" not in line]
    assert {name for cell in caught for name in re.findall(NAME, cell)} <= made
