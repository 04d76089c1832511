"""The installed wheel, in an empty folder: both commands, the launchers, one's own configs, completion, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from contract.command import SMALL, write_inputs
from contract.variants import PLACEHOLDER

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """An environment of its own, with the wheel; what the wheel depends on is this one's."""

    folder: Path
    empty: Path

    def run(self, *words, check=True, **env):
        """What a program of the environment prints, from the empty folder."""
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{self.folder}/bin:{os.environ['PATH']}", **env}
        command = [self.folder / "bin" / words[0], *words[1:]] if words[0] in ("opd", "python") else words
        done = subprocess.run(command, cwd=self.empty, env=own, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder, wheels, empty = (tmp_path_factory.mktemp(name) for name in ("venv", "wheels", "empty"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", wheels], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    words = ["--python", folder / "bin/python", "install", "--no-deps", *wheels.glob("opd-*.whl")]
    subprocess.run([*pip, *words], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # Of a folder named in a .pth file the .pth files are not read: this environment's own opd stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder, empty)


def test_both_commands_answer_with_the_config_of_the_wheel(installed):
    by_script = installed.run("opd", "--cfg", "job").stdout
    by_module = installed.run("python", "-m", "opd", "--cfg", "job").stdout
    assert by_script == by_module and "name: gkd" in by_script
    where = installed.run("python", "-c", "import opd.composition; print(opd.__file__, opd.composition.CONF)").stdout
    assert all(place.startswith(str(installed.folder)) for place in where.split())


def test_hydra_finds_the_launchers_of_the_wheel(installed):
    plugins = installed.run("opd", "--info", "plugins").stdout
    assert all(name in plugins for name in ("LocalLauncher", "OpdSlurmLauncher", "GridSweeper"))
    refused = installed.run("opd", "-m", "method.beta=0,3", check=False)
    assert refused.returncode == 2
    assert refused.stderr == "opd: job 1 (method.beta=3): method.beta=3: must be less than or equal to 1\n"
    refused = installed.run("opd", "hydra/launcher=slurm", "hardware.device=auto", check=False)
    assert refused.returncode == 2 and "not known here" in refused.stderr
    assert not list(installed.empty.iterdir())


@pytest.mark.parametrize("way", [["--config-dir", "{mine}"], ["hydra.searchpath=[file://{mine}]"]])
def test_configs_of_ones_own_are_found(installed, tmp_path, way):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/paper.yaml").write_text("# @package _global_\nmethod:\n  beta: 0.125\n")
    words = [word.format(mine=tmp_path) for word in way]
    assert "beta: 0.125" in installed.run("opd", "experiment=paper", *words, "--cfg", "job", "-p", "method").stdout


def test_the_shell_completes_groups_and_keys(installed):
    installed.run("bash", "-c", 'eval "$(opd -sc install=bash)" && complete -p opd')
    for line, wanted in (
        ("opd hydra/launcher=", "slurm"),
        ("opd method=rev", "reverse_kl"),
        ("opd train.max_", "train.max_steps="),
    ):
        asked = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        assert wanted in installed.run("opd", "-sc", "query=bash", **asked).stdout


def test_two_ranks_train_and_run_the_wheels_code(installed, tmp_path):
    inputs = write_inputs(tmp_path)
    small = [word.replace(PLACEHOLDER, f"{inputs}/") for word in SMALL if not word.startswith("hardware=")]
    run = f"run.dir={tmp_path}/run"
    installed.run("opd", "method=sft", "hardware=cpu_2rank", "train.max_steps=1", run, *small)
    assert "seconds" in json.loads((tmp_path / "run/result.json").read_text())
