"""Hub ids against a stand-in for the hub: splits, revisions, limits, and the cache without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub
from own_rows import SAMPLES

HERE = Path(__file__).parent
# In a process of its own: the libraries read where the hub and the cache are when they are imported.
PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from own_rows import loaded, rows_of
from opd.errors import ConfigError
told = []
for words in json.loads(sys.argv[3]):
    try:
        data = loaded("data=hub", "method=sft", "model/teacher=none", "data.eval_prompts=0", "data.path=me/set", *words)
        told.append([len(data.train), len(data.evaluation)])
    except ConfigError as error:
        told.append(str(error))
print(json.dumps(told))
"""


def ask(home, address, *cases, offline=False):
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-c", PROGRAM, str(HERE), str(HERE.parent), json.dumps(cases)]
    environment = {**os.environ, **settings, "HF_ENDPOINT": address}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def capybara(tmp_path):
    return shutil.copytree(SAMPLES / "capybara", tmp_path / "set")


def test_a_hub_id_is_read_kept_and_found_again_without_a_network(tmp_path, capybara):
    with hub(capybara) as (address, _):
        found = ask(
            tmp_path / "home",
            address,
            ["data.limit=2"],
            [],
            ["data.eval_split=test", "data.eval_prompts=2"],
            ["data.streaming=true", "train.max_steps=2"],
            ["data.revision=main"],
            ["data.revision=nope"],
            ["data.split=nope"],
            ["data.subset=chat"],
            ["data.path=nobody/nothing"],
        )
    assert found[:5] == [[2, 0], [4, 0], [4, 1], [2, 0], [4, 0]]
    starts = ["data.revision=nope: ", "data.split=nope: ", "data.subset=chat: ", "data.path=nobody/nothing: "]
    for line, start in zip(found[5:], starts, strict=True):
        assert line.startswith(start) and "; " in line and "\n" not in line
    assert "choose from train, test" in found[6]
    cases = [[], ["data.limit=1"], [f"data.revision={COMMIT}"], ["data.revision=" + "b" * 40], ["data.subset=chat"]]
    found = ask(tmp_path / "home", "http://127.0.0.1:9", *cases, offline=True)
    assert found[:3] == [[4, 0], [1, 0], [4, 0]]
    assert COMMIT in found[3] and found[3].startswith("data.revision=bbb")
    assert found[4].startswith("data.subset=chat: ")


@pytest.mark.slow
def test_with_a_limit_no_file_behind_it_is_fetched(tmp_path, capybara):
    (capybara / "data" / "train-00000-of-00001.parquet").rename(capybara / "data" / "train-00000-of-00002.parquet")
    shutil.copy(capybara / "data" / "train-00000-of-00002.parquet", capybara / "data" / "train-00001-of-00002.parquet")
    with hub(capybara) as (address, asked):
        assert ask(tmp_path / "home", address, ["data.limit=3"]) == [[3, 0]]
    assert "train-00000-of-00002.parquet" in asked
    assert "train-00001-of-00002.parquet" not in asked and "test-00000-of-00001.parquet" not in asked
