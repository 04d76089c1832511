"""The builder of opsd's dataset reproduces files written by the reference that MANIFEST.json names, byte for byte.

OPD_GOLDEN_DIR names another folder of the same form, as in test_golden.py.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from opd.data.build_opsd import main

FOLDER = Path(os.environ.get("OPD_GOLDEN_DIR") or Path(__file__).parent / "data")
CASES = [case for case in json.loads((FOLDER / "MANIFEST.json").read_text()) if case["method"] == "opsd_builder"]
STAGES = {
    "has_generate": "generate_text",
    "has_validate": "validate_text",
    "has_fix_0": "fix_text",
    "has_judge_0": "judge_0_text",
    "has_fix_1": "fix_1_text",
    "has_judge_1": "judge_1_text",
    "has_fix_2": "fix_2_text",
    "has_judge_2": "judge_2_text",
    "has_final": "final_text",
}


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_the_builder_reproduces_the_reference(case, tmp_path, capsys):
    folder = FOLDER / case["file"]
    flags = ["--system_prompt_path", str(folder / "system_prompt.txt"), "--source_csv", str(folder / "source.csv")]
    if case["params"]["include_final_assistant"]:
        flags.append("--include_final_assistant")
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    ours = counts(capsys.readouterr().out)
    for name, count in counts((folder / "stdout_stats.txt").read_text(encoding="utf-8")).items():
        # Without the final assistant no chain has one, and the report leaves its line out.
        assert ours.get(STAGES.get(name, name), 0) == count, name


def counts(text: str) -> dict[str, int]:
    """{name: n} of every line "name: n"."""
    return {name: int(count) for name, count in re.findall(r"(\w+): (\d+)$", text, re.MULTILINE)}
