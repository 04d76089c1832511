"""docs/launching.md: its commands are accepted, its presets and Slurm settings are those that there are."""

from __future__ import annotations

import re

import pytest
import yaml
from contract.variants import ROOT, compose

from opd.__main__ import CONF
from opd.conditions import validated

PAGE = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
COMMANDS: list[str] = re.findall(r"\| `[^`]*?-m opd (?!-m)([^`]*)` \|$", PAGE, re.MULTILINE)


def table(head: str) -> list[list[str]]:
    """The rows below the table's first line."""
    lines = PAGE.split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_table_is_accepted(words):
    validated(compose(*words.replace("…", "").split()))


def test_the_table_has_its_commands():
    assert len(COMMANDS) == 5


def test_the_presets_of_the_page_are_those_that_there_are():
    told = {name for row in table("| preset | device |") for name in re.findall(r"\w+", row[0].partition("(")[0])}
    assert told == {path.stem for path in (CONF / "hardware").glob("*.yaml")}


def test_every_setting_of_the_slurm_launcher_stands_on_the_page_with_its_default():
    launcher = yaml.safe_load((CONF / "hydra" / "launcher" / "slurm.yaml").read_text(encoding="utf-8"))
    told = {key: yaml.safe_load(default) for key, default, _ in table("| key | default |")}
    assert told == {key: value for key, value in launcher.items() if key not in ("_target_", "mode")}
