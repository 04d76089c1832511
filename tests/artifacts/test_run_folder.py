"""A run's folder: one writer, one config, nothing lost and nothing kept that a resumed run makes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from opd.artifacts.run_folder import RunFolder
from opd.conditions import validated
from opd.errors import ConfigError

CONF = str(Path(__file__).resolve().parents[2] / "conf")


def config(folder, *overrides):
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = compose("config", overrides=[f"run.dir={folder}", *overrides])
    return validated(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]


def checkpoint(folder, step, name=None):
    place = folder / (name or f"checkpoint-{step}")
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return place


def test_a_second_writer_is_refused_until_the_first_lets_go(tmp_path):
    first = RunFolder(config(tmp_path / "run"))
    first.create()
    second = RunFolder(config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"run\.dir=.*another process is writing this run"):
        second.create()
    first.release()
    second.create()
    second.release()


def test_an_evaluation_does_not_take_an_interrupted_training_for_its_own(tmp_path):
    training = RunFolder(config(tmp_path / "run"))
    training.create()
    training.append("metrics.jsonl", {"step": 4})
    training.release()
    with pytest.raises(ConfigError, match="mode: 'train' there, 'eval' here"):
        RunFolder(config(tmp_path / "run", "mode=eval"))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 4}


def test_an_interrupted_run_continues_where_its_artefacts_were_moved_and_not_on_other_ones(tmp_path):
    def words(store, name="sft-0123"):
        folder = tmp_path / store / name / "final_model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        return [f"artifacts.dir={tmp_path / store}", "model/student=path", f"model.student.path={folder}"]

    first = RunFolder(config(tmp_path / "run", *words("here")))
    first.create()
    first.release()
    assert RunFolder(config(tmp_path / "run", *words("there"))).continues
    with pytest.raises(ConfigError, match=r"model\.student\.path: '.*sft-0123.*' there, '.*sft-4567.*' here"):
        RunFolder(config(tmp_path / "run", *words("there", "sft-4567")))


def test_a_run_that_was_killed_while_it_wrote_its_config_can_begin_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.partial").write_text("mode: tr")
    assert not RunFolder(config(tmp_path / "run")).continues


def test_continuing_cuts_what_was_logged_after_the_checkpoint_and_no_text_with_odd_line_ends(tmp_path):
    folder = RunFolder(config(tmp_path / "run"))
    folder.create()
    odd = {"step": 2, "completion": "a\u2028b\u0085c\nd"}
    for record in (odd, {"step": 3}, {"step": 5}):
        folder.append("samples.jsonl", record)
    with (folder.path / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "compl')
    folder.release()
    checkpoint(folder.path, 3)
    again = RunFolder(config(tmp_path / "run"))
    again.create()
    again.release()
    lines = (folder.path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [odd, {"step": 3}]


def test_a_checkpoint_may_have_any_name(tmp_path):
    best = checkpoint(tmp_path, 7, "best")
    folder = RunFolder(config(tmp_path / "run", f"run.resume={best}"))
    assert folder.checkpoint == best and folder.resumed_step == 7 and not folder.continues


@pytest.mark.parametrize(("processes", "sharding"), [(2, "ddp"), (1, "fsdp2")])
def test_a_checkpoint_of_other_ranks_is_refused(processes, sharding, tmp_path):
    saved = checkpoint(tmp_path, 7)
    (saved / "spent.json").write_text(json.dumps({"processes": processes, "sharding": sharding}))
    with pytest.raises(ConfigError) as refused:
        RunFolder(config(tmp_path / "run", f"run.resume={saved}"))
    found = f"run.resume={saved}: was saved by {processes} processes with hardware.sharding={sharding}, and this run has 1 with ddp"
    assert str(refused.value).startswith(found) and len(str(refused.value).splitlines()) == 1


def test_the_last_complete_checkpoint_is_taken_up_by_its_step_and_not_by_its_name(tmp_path):
    folder = RunFolder(config(tmp_path / "run"))
    folder.create()
    folder.release()
    for step in (9, 10):
        checkpoint(folder.path, step)
    assert RunFolder(config(tmp_path / "run")).resumed_step == 10


def test_top_k_is_refused_where_no_distribution_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.teacher\.top_k=5: method=reverse_kl does not read"):
        config(tmp_path, "method=reverse_kl", "model.teacher.top_k=5")
