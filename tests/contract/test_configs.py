"""Everything that can be composed is valid, says what it means, and answers without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from contract.variants import METHODS, ROOT, TABLE, VARIANTS, compose, run_alone
from opd.__main__ import CONF
from opd.artifacts.store import Store
from opd.conditions import validated
from opd.errors import ConfigError
from opd.methods import METHODS as CLASSES
from opd.stage_graph import plan

YAMLS = sorted(CONF.rglob("*.yaml"))
GROUPS = ("data", "model/student", "model/teacher", "tracking")


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture
def files(tmp_path):
    """What the groups that read something ask for: a folder that looks like a model's, and a file of rows."""
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    return {
        "data=file": [f"data.path={rows}"],
        "data=hub": ["data.path=some/set"],
        "data=prompts_file": [f"data.path={rows}"],
        "data=opsd": [f"data.path={rows}"],
        "data=mixture": [f"+data.sources.own.path={rows}", "+data.sources.own.weight=1"],
        "model/student=path": [f"model.student.path={model}"],
        "model/teacher=path": [f"model.teacher.path={model}"],
    }


def accepted(*words):
    """The typed config of the run that these words make, without the stages before it."""
    return validated(run_alone(compose(*words)))


def own(files):
    """The words for one's own rows and models."""
    return [word for choice, words in files.items() for word in (choice, *words)]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_stands_in_the_table_of_variants_and_in_the_table_of_classes(method):
    assert method in TABLE
    assert method in CLASSES


def test_every_class_has_a_yaml():
    assert sorted(CLASSES) == METHODS
    assert sorted(TABLE) == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hardware", options("hardware"))
def test_a_method_and_its_stages_are_valid_on_every_hardware(method, hardware, tmp_path):
    raw = compose(f"method={method}", f"hardware={hardware}")
    assert raw["method"]["name"] == method and raw["hardware"]["name"] == hardware
    plan(raw, raw.pop("stages", None) or {}, Store(tmp_path))  # checks the config of every stage
    validated(raw)


CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group)]


@pytest.mark.parametrize(
    ("method", "choice"),
    [  # by default each choice with every third method
        pytest.param(method, choice, marks=[pytest.mark.slow] * ((i + j) % 3 > 0))
        for i, method in enumerate(METHODS)
        for j, choice in enumerate(CHOICES)
    ],
)
def test_a_method_is_valid_with_every_data_and_model(method, choice, files):
    raw = run_alone(compose(f"method={method}", choice, *files.get(choice, [])))
    needs = CLASSES[method](CLASSES[method].Config(**raw["method"])).needs
    if choice == "model/teacher=none" and any(need.model == "teacher" for need in needs.teachers.values()):
        with pytest.raises(ConfigError, match="model/teacher=none"):
            validated(raw)
    else:
        validated(raw)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_is_valid(variant):
    accepted(f"method={variant.method}", *variant.words)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_composes_and_says_its_method(experiment, files):
    choices = compose_choices(f"experiment={experiment}")
    config = accepted(f"experiment={experiment}", *(word for choice in choices for word in files.get(choice, [])))
    assert config.run.name == experiment
    assert f"method={config.method.name}" in choices


def compose_choices(*overrides):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        runtime = compose("config", overrides=list(overrides), return_hydra_config=True).hydra.runtime
    return {f"{group}={option}" for group, option in runtime.choices.items()}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_methods_yaml_says_is_what_a_run_on_ones_own_rows_uses(method, files):
    from omegaconf import OmegaConf

    said: Any = OmegaConf.to_container(OmegaConf.load(CONF / "method" / f"{method}.yaml"))
    said.pop("defaults", None)
    assert_holds(compose(f"method={method}", *own(files)), said)


def assert_holds(raw, said, key=""):
    """Everything that is said stands in the config; an interpolation may have become anything."""
    for name, value in said.items():
        place = f"{key}.{name}" if key else name
        if isinstance(value, dict):
            assert_holds(raw[name], value, place)
        elif "${" not in str(value):
            assert raw[name] == value, place


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONF)))
def test_a_yaml_opens_with_a_comment_that_is_more_than_its_package(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[:3] if line.startswith("#") and "@package" not in line]
    assert lines[0].startswith("#") and header and len(header[0]) > 10


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_of_a_yaml_has_a_comment_on_its_line(path):
    assert bare_keys(path) == []


def bare_keys(path):
    """Keys with a value and no comment; Hydra's own, and those of `defaults`, are the group's."""
    section, bare = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        if section in ("defaults", "hydra"):
            continue
        match = re.match(r"\s*(\w+):\s*([^#\s].*)$", line)
        if match and " #" not in line:
            bare.append(match[1])
    return bare


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hardware", ["a800x2", "h100x8"])
def test_no_laptop_default_leaks_into_a_run_on_gpus(method, hardware, files):
    laptop = compose(f"method={method}", "hardware=cpu_tiny")
    gpus = accepted(f"method={method}", f"hardware={hardware}")
    assert gpus.hardware.precision == "bf16" and gpus.hardware.device == "cuda"
    assert gpus.train.micro_batch_size != laptop["train"]["micro_batch_size"]
    assert gpus.train.log_every_steps != laptop["train"]["log_every_steps"]
    mine = accepted(f"method={method}", f"hardware={hardware}", *own(files))
    assert mine.model.student.dtype == mine.model.teacher.dtype == "auto"
    assert mine.model.student.recipe is None and mine.model.teacher.recipe is None


@pytest.mark.parametrize(("words", "seconds"), [(["--help"], 0.6), (["--cfg", "job"], 0.6)])
def test_help_and_config_answer_in_a_moment(words, seconds):
    assert min(timed("-m", "opd", *words) for _ in range(6)) < seconds


def timed(*words):
    """CPU seconds of the process: what it costs, whoever else is busy."""
    before = os.times()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["method.beta=3"]], ids=" ".join)
def test_help_config_and_a_refusal_import_no_torch(words):
    program = (
        "import sys; sys.argv = ['opd', *sys.argv[1:]]\n"
        "from opd.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
