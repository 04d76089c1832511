"""The README's commands run, and every file, link, key and group option that it names exists."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in BASH.splitlines() if line.startswith("python -m opd")]
ON_GPU = re.compile(r"hardware=(h100|a800)")
MINUTES = re.compile(r"opd -m|opd\.compare|hardware=laptop")  # several runs each, of what is tested elsewhere
SMALL = ["train.max_steps=1", "train.batch_size=4", "data.eval_prompts=4", "train.eval_every_steps=0"]
SMALL_WALK = ["model.student.recipe.steps=2", "model.teacher.recipe.steps=2", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the rows and the models that the README's commands name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd.data.walk_tokenizer import build_tokenizer

    place = tmp_path_factory.mktemp("readme")
    rows = [{"prompt": f"{n} to {n + 5}", "completion": f"{n + 1}"} for n in range(10, 30)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = build_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(shape).save_pretrained(place / "my" / name)
        tokenizer.save_pretrained(place / "my" / name)
    return place


def test_the_readme_has_commands_for_the_cpu_and_stays_short():
    assert len([command for command in COMMANDS if not ON_GPU.search(command)]) >= 4
    assert len(README.splitlines()) <= 200
    assert "make demo" in "\n".join(README.splitlines()[:15])


def test_what_opd_depends_on_can_be_installed_with_every_python_that_the_readme_names():
    first, last = re.search(r"Python 3\.(\d+)–3\.(\d+)", README).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "dev" for each in extra]
    wanted = {"opd": project["requires-python"]}
    wanted |= {name: metadata(name)["Requires-Python"] or "" for name in map(name_of, project["dependencies"] + extras)}
    for minor in range(int(first), int(last) + 1):
        assert not [name for name, pythons in wanted.items() if f"3.{minor}.0" not in SpecifierSet(pythons)]


def name_of(requirement: str) -> str:
    return Requirement(requirement).name


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=pytest.mark.slow) if MINUTES.search(command) else command for command in COMMANDS],
)
def test_a_command_of_the_readme_runs(command, workplace):
    _, _, module, *words = command.replace("…", "rows.jsonl").split()
    if module == "opd.compare":
        for experiment in ("walk_gkd", "walk_sft"):  # what it compares
            run("opd", [f"experiment={experiment}", *SMALL, *SMALL_WALK], workplace)
    if module != "opd":
        assert run(module, words, workplace).stdout
        return
    if ON_GPU.search(command):
        words += ["--cfg", "job"]  # no such machine here: what it would use is composed
    elif "--cfg" not in words:
        words += SMALL if "data=file" in command else [*SMALL, *SMALL_WALK]
    done = run(module, words, workplace)
    if "--cfg" not in words:
        said = "nothing stands against this training" if "mode=check" in words else "report.html"
        assert said in done.stdout


def run(module, words, workplace):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPD_ARTIFACTS": str(workplace / "artifacts")}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_every_link_and_every_path_in_the_map_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    mapped = re.findall(r"^((?:conf|opd)/[\w/.]*)", README, re.MULTILINE) + re.findall(r"\s(opd/[\w/.]+)", README)
    named = re.findall(r"`((?:opd|conf|tests|docs|outputs)/[\w/.*]+?)`", README)
    assert len(links) > 5 and len(mapped) > 8
    for path in [*links, *mapped, *named]:
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_every_key_and_option_that_the_readme_names_composes():
    prose = re.sub(r"```python.*?```", "", README, flags=re.DOTALL)
    pairs = re.findall(r"(?<![\w/.])([a-z_]+(?:[./][a-z_]+)*)=([^\s`,;)|]+)", prose)
    owners = {
        key: path.stem
        for path in (ROOT / "conf" / "method").glob("*.yaml")
        for key in re.findall(r"^  (\w+):", path.read_text(), re.MULTILINE)
    }
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for key, value in pairs:
            value = "x" if "…" in value else value.split(",")[0]
            group, _, name = key.partition(".")
            owner = owners.get(name) if group == "method" else "adpa" if group == "stages" else None
            method = [f"method={owner}"] if owner else []
            method += ["model/adapter=lora"] if ".lora." in key else []
            method += ["data=file", "data.path=x"] if key.startswith("data.") else []
            compose("config", overrides=[*method, f"{key}={value}"])
    assert len(pairs) > 10


def test_every_method_stands_in_the_table_with_its_file():
    for config in (ROOT / "conf" / "method").glob("*.yaml"):
        assert re.search(rf"^\| {config.stem} \|.*opd/methods/{config.stem}\.py", README, re.MULTILINE), config.stem


def test_the_method_that_the_readme_writes_out_learns(tmp_path):
    """The block under "Add a method" is a method: it is compiled, and gives gkd's forward KL."""
    import torch

    from opd.data.collate import lay_out
    from opd.methods.gkd import GKD
    from opd.protocols import Batch, Dense, Head, TeacherNeed, TokenView

    source = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert source is not None
    (tmp_path / "forward_kl.py").write_text(source[1], encoding="utf-8")
    space = runpy.run_path(str(tmp_path / "forward_kl.py"))
    method = space["ForwardKL"](space["ForwardKL"].Config(name="forward_kl"))
    gkd = GKD(GKD.Config(name="gkd", beta=0, lmbda=0, seq_kd=False, kd_temperature=1))
    torch.manual_seed(0)
    layout = lay_out([TokenView([1, 2, 3, 4], [False, False, True, True])], pad_id=0)
    student, teacher = (Dense(torch.randn(2, 7, dtype=torch.float64), Head(None)) for _ in range(2))
    ours, theirs = (m.loss(student, {"teacher": teacher}, Batch([], layout)) for m in (method, gkd))
    assert ours.terms[0].sum == theirs.terms[0].sum > 0
    assert method.needs.teachers == {"teacher": TeacherNeed("any")}
