"""One command, six runs: adpa's graph on models of a few thousand parameters, whole, killed, changed, and twice at once.

What is expected of every other way through the graph is what the uninterrupted command gives, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contract.command import fingerprint, start, train_losses

from e2e.adpa_graph import STAGES, STEPS, TRAINED, assert_close, graph, made, result_of, told, words
from e2e.command import ENVIRONMENT, ROOT


def written(folder: Path) -> dict[str, int]:
    """When each file of an artefact was last written; `used` notes its last use."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "used")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def artefacts(store: Path) -> dict[str, dict[str, int]]:
    """The whole artefacts of a store, and when their files were written."""
    return {file.parent.name: written(file.parent) for file in store.glob("*/artifact.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted command."""
    place = tmp_path_factory.mktemp("whole")
    graph(place)
    return place


@pytest.fixture
def place(whole, tmp_path):
    """A place whose store holds what the uninterrupted command made."""
    shutil.copytree(whole / "store", tmp_path / "store")
    return tmp_path


def test_one_command_makes_every_stage_and_then_the_run(whole):
    assert made(whole) == STAGES
    said = (whole / "log").read_text()
    for number, name in enumerate(STAGES, 1):
        assert f"stage {number}/{len(STAGES)} {name} (" in said
    result = json.loads((whole / "run" / "result.json").read_text())
    assert result["steps"] == STEPS
    assert (whole / "run" / "final_model" / "model.safetensors").is_file()
    # The bases are made once, also where the teacher's is fine-tuned as a student.
    assert [path.name[:12] for path in sorted((whole / "store").glob("walk-*-????????????"))] == [
        *("walk-student", "walk-teacher")
    ]
    assert not list((whole / "store").rglob("checkpoint-*"))
    assert not list((whole / "store").glob("*.partial"))


def test_the_artefacts_say_what_they_were_made_from(whole):
    listed = subprocess.run(
        [sys.executable, "-m", "opd.artifacts", "list", "--json", "--dir", str(whole / "store")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    stages, found = told(whole), {entry["name"]: entry for entry in json.loads(listed.stdout)["artifacts"]}
    assert {found[stages[name]["address"]]["stage"] for name in STAGES} == {
        "student_sft sft",
        "ref_teacher sft",
        "dpo_teacher dpo",
        "responses sft",
        "scores adpa",
    }
    assert found[stages["dpo_teacher"]["address"]]["inputs"] == [stages["ref_teacher"]["address"]]
    assert set(found[stages["scores"]["address"]]["inputs"]) == {
        stages[name]["address"] for name in ("dpo_teacher", "ref_teacher", "responses")
    }


def test_what_tells_two_runs_apart_is_told_beside_them(whole):
    """The run's own config only has folders in its place."""
    stages = told(whole)
    assert stages["student_sft"]["settings"]["model"]["student"]["recipe"]["hidden_size"] == 16
    assert stages["dpo_teacher"]["settings"]["method"]["beta"] == 0.3
    assert stages["dpo_teacher"]["made_in_seconds"] < stages["dpo_teacher"]["seconds"]


def test_a_finished_stage_writes_only_into_its_own_log(whole):
    for name in STAGES:
        log = (whole / "store" / told(whole)[name]["address"] / "training.log").read_text()
        assert "stage " not in log


def test_another_beta_of_the_dpo_teacher_runs_it_and_what_follows_again_and_nothing_else(whole, place):
    before = artefacts(place / "store")
    graph(place, "stages.dpo_teacher.method.beta=0.2")
    assert made(place) == ["dpo_teacher", "scores"]
    after = artefacts(place / "store")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    assert fingerprint(place / "run") != fingerprint(whole / "run")


def test_a_removed_artefact_is_made_again_only_where_something_has_yet_to_read_it(whole, place):
    teacher = told(whole)["ref_teacher"]["address"]
    shutil.rmtree(place / "store" / teacher)
    graph(place)
    assert made(place) == [] and not (place / "store" / teacher).exists()
    assert fingerprint(place / "run") == fingerprint(whole / "run")
    shutil.rmtree(place / "run")
    shutil.rmtree(place / "store" / told(whole)["scores"]["address"])
    graph(place)
    assert made(place) == ["ref_teacher", "scores"]
    assert fingerprint(place / "run") == fingerprint(whole / "run")


def test_a_failure_in_a_stage_names_the_stage_and_its_key(place):
    command = start(words(place, "stages.ref_teacher.train.batch_size=64"), place / "log")
    command.process.join(timeout=120)
    assert command.process.exitcode == 2
    last = command.said.splitlines()[-1]
    assert last.startswith("opd: stages.ref_teacher.train.batch_size=64: the data has only 32 training rows")


def test_a_kill_between_the_last_word_of_a_stage_and_its_move_costs_no_training(whole, place):
    address = place / "store" / told(whole)["dpo_teacher"]["address"]
    shutil.rmtree(place / "store" / told(whole)["scores"]["address"])
    (address / "artifact.json").unlink()
    partial = address.rename(address.with_name(address.name + ".partial"))
    before = written(partial)
    graph(place)
    assert made(place) == ["dpo_teacher", "scores"]
    after = written(address)
    assert {name: after[name] for name in before} == before
    assert fingerprint(place / "run") == fingerprint(whole / "run")


def steps_done(folder: Path) -> int:
    return max((step for step, _ in train_losses(folder)), default=0)


def is_under_way(stage: str, folder: Path) -> bool:
    """Whether a kill now comes in the middle of this stage."""
    if stage == "responses":
        return any(part.stat().st_size for part in folder.glob(".responses-*"))
    if stage == "scores":
        return (folder / "provenance.json").is_file()
    return steps_done(folder) >= STEPS // 2


def kill_in(stage: str, command, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not is_under_way(stage, folder):
        assert command.process.is_alive() and time.monotonic() < deadline, command.said[-3000:]
        time.sleep(0.002)
    command.kill()


@pytest.mark.slow
def test_killed_in_every_stage_and_in_itself_it_ends_with_the_same_weights(tmp_path):
    """ADPA+, the longest way: the same line again and again, killed in one stage after the other."""
    plus = "model.student.init=stage:student_dckd"
    (tmp_path / "whole").mkdir()
    graph(tmp_path / "whole", plus)
    stages, broken = told(tmp_path / "whole"), tmp_path / "broken"
    broken.mkdir()
    assert list(stages) == ["student_sft", "ref_teacher", "dpo_teacher", "student_dckd", "responses", "scores"]
    for number, (name, stage) in enumerate(stages.items()):
        partial = broken / "store" / f"{stage['address']}.partial"
        before = artefacts(broken / "store")
        kill_in(name, start(words(broken, plus), broken / f"{name}.log"), partial)
        assert partial.is_dir() and not (partial / "artifact.json").exists()
        after = artefacts(broken / "store")
        assert {kept: after[kept] for kept in before} == before
        assert {made["address"] for made in list(stages.values())[:number]} <= after.keys()
    kill_in("adpa", start(words(broken, plus), broken / "adpa.log"), broken / "run")
    said = graph(broken, plus).said
    assert made(broken) == []
    assert f"continues the interrupted run in {broken / 'run'} from step " in said
    for name in TRAINED:
        assert fingerprint(result_of(broken, name).parent) == fingerprint(result_of(tmp_path / "whole", name).parent)
        ours, theirs = (train_losses(result_of(p, name).parent) for p in (broken, tmp_path / "whole"))
        assert ours == theirs and len(ours) == STEPS
    for file in ("responses.jsonl", "scores.safetensors"):
        name = file.partition(".")[0]
        ours, theirs = (result_of(p, name) / file for p in (broken, tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert fingerprint(broken / "run") == fingerprint(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_a_stage_that_was_killed_continues_for_a_command_with_another_cadence(whole, tmp_path):
    partial = tmp_path / "store" / (told(whole)["student_sft"]["address"] + ".partial")
    kill_in("student_sft", start(words(tmp_path), tmp_path / "killed.log"), partial)
    other = ("train.micro_batch_size=4", "train.save_every_steps=3", "evaluation.sampled=true")
    said = graph(tmp_path, *other).said
    assert f"continues the interrupted run in {partial} from step 2" in said
    assert made(tmp_path) == STAGES


@pytest.mark.slow
def test_two_commands_at_once_make_each_stage_once_and_end_with_equal_weights(whole, tmp_path):
    places = [tmp_path / name for name in ("a", "b")]
    commands = []
    for place in places:
        place.mkdir()
        commands.append(start(words(place, store=tmp_path / "store"), place / "log"))
    for command in commands:
        command.finish()
    assert sorted(made(places[0]) + made(places[1])) == sorted(STAGES)
    assert {name: told(places[0])[name]["address"] for name in STAGES} == {
        name: told(places[1])[name]["address"] for name in STAGES
    }
    assert not list((tmp_path / "store").glob("*.partial"))
    assert fingerprint(places[0] / "run") == fingerprint(places[1] / "run") == fingerprint(whole / "run")


@pytest.mark.slow
def test_each_stage_alone_with_paths_gives_what_it_gives_in_the_graph(whole, place):
    """And none of them makes a stage."""
    paths = {name: str(result_of(whole, name)) for name in STAGES}
    before = artefacts(place / "store")
    folders = [
        f"model.student.init={paths['student_sft']}",
        f"data.responses={paths['responses']}",
        f"method.dpo_teacher={paths['dpo_teacher']}",
        f"method.ref_teacher={paths['ref_teacher']}",
    ]

    def alone(*more: str) -> Path:
        shutil.rmtree(place / "run", ignore_errors=True)
        graph(place, *more)
        assert artefacts(place / "store") == before and not (place / "run" / "stages.json").exists()
        return place / "run"

    answers = alone("mode=responses", folders[0], "rollout.temperature=0") / "responses.jsonl"
    assert answers.read_bytes() == (Path(paths["responses"]) / "responses.jsonl").read_bytes()
    kept = alone("mode=scores", *folders, "method.scores=null") / "scores.safetensors"
    assert kept.read_bytes() == (Path(paths["scores"]) / "scores.safetensors").read_bytes()
    assert fingerprint(alone(*folders, f"method.scores={paths['scores']}")) == fingerprint(whole / "run")
    # Without kept scores the teachers score every step anew: the same numbers, up to the order of their sums.
    assert_close(alone(*folders, "method.scores=null"), whole / "run")


@pytest.mark.slow
def test_answers_and_scores_can_be_the_end_of_the_graph(whole, place):
    for mode, file, *more in (
        ("responses", "responses.jsonl", "rollout.temperature=0"),
        ("scores", "scores.safetensors", "method.scores=null"),
    ):
        shutil.rmtree(place / "run", ignore_errors=True)
        graph(place, f"mode={mode}", *more)
        assert made(place) == []
        assert (place / "run" / file).read_bytes() == (result_of(whole, mode) / file).read_bytes()


@pytest.mark.slow
def test_a_sweep_makes_what_its_runs_share_once(place):
    folder = place / "sweep"
    swept = ["-m", *words(place), f"hydra.sweep.dir={folder}", "stages.dpo_teacher.method.beta=0.2,0.3"]
    swept.remove(f"run.dir={place / 'run'}")
    start(swept, place / "log").finish()
    stages = [json.loads((folder / job / "stages.json").read_text()) for job in ("0", "1")]
    assert [[stage["stage"] for stage in job if not stage["reused"]] for job in stages] == [
        ["dpo_teacher", "scores"],
        [],
    ]


@pytest.mark.slow
def test_on_two_ranks_an_interrupted_graph_continues_and_ends_where_one_rank_does(whole, place):
    for name in ("dpo_teacher", "responses", "scores"):
        shutil.rmtree(place / "store" / told(whole)[name]["address"])
    command = [sys.executable, "-m", "opd", *words(place, "hardware=cpu_2rank", "train.micro_batch_size=4")]
    settings = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **settings)
    partial = place / "store" / (told(whole)["dpo_teacher"]["address"] + ".partial")
    deadline = time.monotonic() + 240
    while steps_done(partial) < 1:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said[-3000:]
    assert "interrupted; the same command" in said
    again = subprocess.run(command, **settings, timeout=280)
    assert again.returncode == 0, again.stdout[-3000:]
    assert made(place) == ["dpo_teacher", "responses", "scores"]
    assert_close(place / "run", whole / "run")


@pytest.mark.slow
def test_torchrun_trains_the_stages_too(whole, tmp_path):
    torchrun = [sys.executable, *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opd")]
    command = [*torchrun, *words(tmp_path, "hardware=cpu_2rank", "train.micro_batch_size=4")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert made(tmp_path) == STAGES
    assert_close(tmp_path / "run", whole / "run")
