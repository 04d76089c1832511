"""docs/from-scripts.md: what it maps exists, its defaults are the ones in use, its commands are accepted, nothing is missing."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract.variants import ROOT
from pydantic import BaseModel

from opd.__main__ import CONF
from opd.artifacts.store import Store
from opd.conditions import validated
from opd.config import Config
from opd.data import build_opsd
from opd.methods import METHODS
from opd.stage_graph import begun, plan
from recipes.guides import GUIDES

PAGE = (ROOT / "docs" / "from-scripts.md").read_text(encoding="utf-8")
HEAD = ["there", "here", "default", "differs, why"]


@dataclass(frozen=True)
class Row:
    """A line of a table that maps: its cells, the section it stands in, the words its defaults are of."""

    there: str
    here: str
    default: str
    why: str
    section: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.there


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_rows() -> list[Row]:
    rows, section, words, mapping = [], "", (), False
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif found := re.match(r"Defaults: `(.+)`$", line):
            words = tuple(found[1].split())
        elif not line.startswith("|"):
            mapping = False
        elif cells(line) == HEAD:
            mapping = True
        elif mapping and not line.startswith("|---"):
            rows.append(Row(*cells(line), section, words))
    return rows


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


ROWS = read_rows()
KEYS = [token for row in ROWS for token in quoted(row.here)]
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line for line in BLOCKS.splitlines() if line.strip()]


@cache
def composed(words: tuple[str, ...]) -> Any:
    """The config of these words, with what is missing still missing."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return OmegaConf.to_container(compose("config", overrides=list(words)), resolve=True)


def section_of(schema: Any, name: str) -> Any:
    """The schema of a field: a section, None for a value, or a refusal."""
    assert name in schema.model_fields, name
    annotation = schema.model_fields[name].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def assert_key(key: str, words: tuple[str, ...]) -> None:
    """The key stands in the schema; one of a method in that of the section's method."""
    schema: Any = Config
    first, *rest = key.split(".")
    if first == "method":
        schema = METHODS[next(word.removeprefix("method=") for word in words if word.startswith("method="))].Config
    else:
        schema = section_of(Config, first)
    for name in rest:
        if schema is None:
            return  # a mapping of the user's own, e.g. data.columns
        schema = section_of(schema, name)


def assert_exists(token: str, words: tuple[str, ...]) -> None:
    key, _, value = token.partition("=")
    if (CONF / key).is_dir():
        assert (CONF / key / f"{value}.yaml").is_file(), token
    else:
        assert_key(key, words)


def test_the_page_has_its_tables():
    assert len(ROWS) > 150 and len(COMMANDS) > 30
    assert {row.section for row in ROWS} == {line[3:] for line in PAGE.splitlines() if re.match(r"## \d\. ", line)}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_key_of_a_row_exists(row):
    for token in quoted(row.here):
        if not token.startswith("mode="):
            assert_exists(token, row.words)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_key_named_in_a_remark_exists(row):
    """In a remark a backticked word that looks like a setting is one; stages' and methods' own are told with their place."""
    for token in quoted(row.why):
        if re.fullmatch(
            r"[a-z_/]+=[\w.\-]+|(data|train|model|method|rollout|hardware|run|tracking)\.[\w.]+(=\S+)?", token
        ):
            words = ("method=adpa",) if "method=adpa" in row.why else row.words
            assert_exists(token, words) if not token.startswith("mode=") else None


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_default_of_a_row_is_the_one_in_use(row):
    """One value a key, in their order; none where the row names a setting instead of a key, or no key."""
    keys = [token for token in quoted(row.here) if "=" not in token]
    if row.default == "–":
        assert not keys or "not yet" in row.here, row.default
        return
    if row.default == "???":
        used = [value_at(composed(row.words), key) for key in keys]
        assert all(value == "???" or str(value).startswith("outputs/") for value in used), used
        return
    said = [yaml.safe_load(value) for value in quoted(row.default)]
    assert said == [value_at(composed(row.words), key) for key in keys]


def value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name)
    return config


@pytest.mark.parametrize("guide", GUIDES)
def test_everything_the_guide_names_has_a_row(guide):
    rows = [row for row in ROWS if row.section.startswith(guide)]
    told = {word for row in rows for word in re.split(r"[\s,]+", " ".join(quoted(row.there)))}
    told |= {word.rstrip(":") for word in told}
    assert [word for word in GUIDES[guide].split() if word not in told] == []


def test_a_flag_of_build_opsd_that_is_named_is_one():
    known = {flag for action in build_opsd._parser()._actions for flag in action.option_strings}
    named = {
        flag
        for row in ROWS
        for flag in re.findall(r"--\w+", row.here + row.why)
        if "build_opsd" in row.there + row.here
    }
    named |= {flag for row in ROWS if "flag" in row.here for flag in re.findall(r"--\w+", row.here)}
    assert named and named <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))
    words = [word for word in shlex.split(os.path.expandvars(command)) if not re.match(r"[A-Z_]+=", word)]
    assert words[:2] == ["python", "-m"]
    if words[2] == "opd.data.build_opsd":
        build_opsd._parser().parse_args(words[3:])
        return
    assert words[2] == "opd"
    for raw in jobs(words[3:]):
        accept(raw, Store(tmp_path))


def jobs(words: list[str]) -> list[dict[str, Any]]:
    """The config of the command, or of every job of its sweep."""
    from contract.variants import compose

    sweep = words[0] == "-m"
    words = words[1:] if sweep else words
    for word in words:
        make_what_it_names(word)
    choices = [[word] for word in words]
    if sweep:
        choices = [
            [f"{key}={value}" for value in values.split(",")] for key, values in (w.split("=", 1) for w in words)
        ]
    return [compose(*[options[min(n, len(options) - 1)] for options in choices]) for n in range(max(map(len, choices)))]


def make_what_it_names(word: str) -> None:
    """Files and folders that a command reads."""
    key, _, value = word.partition("=")
    path = Path(value)
    if key == "data.path" and path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    elif key == "data.path":
        path.mkdir(parents=True)
        (path / "train_sft.jsonl").write_text("", encoding="utf-8")
    elif (key == "model.student.path" and value.count("/") > 1) or (
        key == "model.student.init" and "stage:" not in value
    ):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}", encoding="utf-8")


def accept(raw: dict[str, Any], store: Store) -> None:
    """Everything that is checked before torch is imported, of the run and of its stages."""
    definitions = raw.pop("stages", None) or {}
    validated(begun(raw))
    plan(raw, definitions, store)


def test_the_recipes_of_the_page_are_those_that_there_are():
    there = {path.stem for path in (CONF / "experiment").glob("*.yaml") if not path.stem.startswith("walk_")}
    table = PAGE.split("experiment=…`")[1].split("\n\n")[0]
    assert set(re.findall(r"\b[a-z]+_\w+", table)) == there
    assert {name for line in COMMANDS for name in re.findall(r"experiment=(\w+)", line)} == there
