"""The store: an artefact is made once, by one process, is whole or not there, and knows what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import opd
from opd.artifacts import digests
from opd.artifacts.digests import source_version
from opd.artifacts.store import Store
from opd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"stage": "teacher", "method": {"name": "dpo", "beta": 0.1}}

# Asks a store for the artefact of RECIPE. Making it writes `half`, waits for `go` (beside the store), writes `other`.
ASKS = f"""
import logging, os, sys, time
from pathlib import Path
from opd.artifacts.store import Store

folder, resumable = Path(sys.argv[1]), sys.argv[2] == "resumable"
logging.getLogger("opd").addHandler(logging.StreamHandler())
logging.getLogger("opd").setLevel(logging.INFO)

def make(place):
    (place / "half").write_text("1")
    with (folder.parent / "calls").open("a") as calls:
        calls.write("made\\n")
    while not (folder.parent / "go").exists():
        time.sleep(0.01)
    (place / "other").write_text("2")

print(Store(folder).get_or_make("run", {RECIPE!r}, make, resumable=resumable))
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def start():
    """Starts Python on a script, in a process that ends with the test at the latest."""
    started = []

    def begin(script, *words):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def artifacts(folder, *words):
    """`python -m opd.artifacts`, as a person runs it."""
    return subprocess.run(
        [sys.executable, "-m", "opd.artifacts", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPD_ARTIFACTS": str(folder)},
        timeout=60,
    )


def wait_for(file):
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


def write(text, name="model"):
    return lambda folder: (folder / name).write_text(text)


def must_not_be_made(folder):
    raise AssertionError(f"{folder} is made again")


def label(place):
    return json.loads((place / "artifact.json").read_text())


def killed_halfway(store, start, resumable):
    process = start(ASKS, store.folder, resumable)
    wait_for(store.folder.parent / "calls")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (store.folder.parent / "go").touch()


def test_two_processes_that_ask_at_once_share_one_making_and_the_second_says_whom_it_waits_for(store, start, tmp_path):
    first = start(ASKS, store.folder, "whole")
    wait_for(tmp_path / "calls")
    second = start(ASKS, store.folder, "whole")
    said = second.stderr.readline()
    (tmp_path / "go").touch()
    assert said.strip().endswith(f"is being made by pid {first.pid} on {socket.gethostname()}: waiting for it")
    places = {process.communicate(timeout=30)[0].strip() for process in (first, second)}
    assert first.returncode == second.returncode == 0
    assert places == {str(store.address("run", RECIPE))}
    assert (tmp_path / "calls").read_text() == "made\n"


def test_who_waited_for_a_process_that_was_killed_makes_the_artefact_itself(store, start, tmp_path):
    first = start(ASKS, store.folder, "whole")
    wait_for(tmp_path / "calls")
    second = start(ASKS, store.folder, "whole")
    second.stderr.readline()
    first.kill()
    (tmp_path / "go").touch()
    assert second.wait(timeout=30) == 0
    assert (tmp_path / "calls").read_text() == "made\nmade\n"
    assert (store.find("run", RECIPE) / "other").read_text() == "2"


@pytest.mark.parametrize(("resumable", "left"), [(False, []), (True, ["half"])])
def test_after_a_kill_a_resumable_making_goes_on_where_it_was_and_another_begins_anew(store, start, resumable, left):
    killed_halfway(store, start, "resumable")
    assert store.find("run", RECIPE) is None
    found = []

    def make(folder):
        assert folder.name.endswith(".partial")
        found.extend(file.name for file in folder.iterdir())
        (folder / "model").write_text("whole")

    place = store.get_or_make("run", RECIPE, make, resumable=resumable)
    assert found == left
    assert {file.name for file in place.iterdir()} == {*left, "model", "artifact.json", "used"}
    assert {path.name for path in store.folder.iterdir()} == {place.name, f"{place.name}.lock"}


# What a making does to the disk by itself: a note replaced, the folder, the label replaced, the use, the move.
@pytest.mark.parametrize(
    ("step", "nth"), [("replace", 1), ("mkdir", 2), ("replace", 2), ("touch", 1), ("unlink", 1), ("rename", 1)]
)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_leaves_a_whole_artefact_or_a_partial_one(store, start, step, nth, after):
    script = f"""
import os, sys
from pathlib import Path
from opd.artifacts.store import Store
real, calls = Path.{step}, []
def step(self, *words, **more):
    calls.append(self)
    if len(calls) < {nth}:
        return real(self, *words, **more)
    if {after}:
        real(self, *words, **more)
    os.kill(os.getpid(), 9)
Path.{step} = step
Store(Path(sys.argv[1])).get_or_make("run", {RECIPE!r}, lambda folder: (folder / "model").write_bytes(b"whole"))
"""
    process = start(script, store.folder)
    assert process.wait(timeout=30) == -signal.SIGKILL
    whole = step == "rename" and after
    assert (store.find("run", RECIPE) is not None) == whole
    assert all(artifact.partial != whole for artifact in store.artifacts())
    labelled = whole or (step, nth, after) not in {
        ("replace", 1, False), ("replace", 1, True), ("mkdir", 2, False), ("mkdir", 2, True), ("replace", 2, False)
    }  # fmt: skip
    place = store.get_or_make("run", RECIPE, must_not_be_made if labelled else write("whole"))
    assert (place / "model").read_text() == "whole" and label(place)["recipe"] == RECIPE
    assert {path.name for path in store.folder.iterdir()} == {place.name, f"{place.name}.lock"}


def test_a_making_that_fails_leaves_no_artefact_and_lets_the_next_one_try(store):
    def fail(folder):
        (folder / "half").write_text("1")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.get_or_make("run", RECIPE, fail)
    assert store.find("run", RECIPE) is None
    assert (store.get_or_make("run", RECIPE, write("whole")) / "model").exists()


def test_an_artefact_says_what_made_it_from_what_when_and_at_what_cost(store, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    teacher = store.get_or_make("teacher", {"seed": 1}, write("t"))

    def make(folder):
        time.sleep(0.05)
        (folder / "model").write_text("12345")

    place = store.get_or_make("run", RECIPE, make, inputs=[teacher / "model", rows])
    said = label(place)
    assert said["kind"] == "run" and said["recipe"] == RECIPE and said["opd_version"] == opd.__version__
    assert said["inputs"] == [teacher.name, str(rows.resolve())]
    assert said["bytes"] == 5 and 0.05 <= said["seconds"] < 60
    assert said["command"] == shlex.join(sys.argv)
    age = datetime.now(UTC) - datetime.fromisoformat(said["created"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_finding_an_artefact_notes_its_use_and_finds_nothing_else(store):
    place = store.get_or_make("run", RECIPE, write("whole"))
    os.utime(place / "used", (0, 0))
    assert store.find("run", RECIPE | {"stage": "student"}) is None and store.find("walk", RECIPE) is None
    assert (place / "used").stat().st_mtime == 0
    assert store.find("run", RECIPE) == place == store.get_or_make("run", RECIPE, must_not_be_made)
    assert time.time() - (place / "used").stat().st_mtime < 60


def test_a_store_that_cannot_be_made_is_refused_by_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^artifacts\.dir=.*file/store: cannot be made \(Not a directory\); choose"):
        Store(tmp_path / "file" / "store").get_or_make("run", RECIPE, must_not_be_made)


# --- the command


@pytest.fixture
def lineage(store, tmp_path):
    """Rows outside the store -> teacher -> responses, and both of these -> final."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    teacher = store.get_or_make("teacher", RECIPE, write("t" * 2_500_000), inputs=[rows])
    responses = store.get_or_make("responses", {"stage": "responses"}, write("r"), inputs=[teacher])
    final = store.get_or_make("final", {"seed": 0}, write("f"), inputs=[teacher, responses])
    return {"rows": str(rows.resolve()), "teacher": teacher, "responses": responses, "final": final}


def test_list_shows_each_artefact_its_stage_size_and_inputs_and_the_sum(store, lineage):
    answer = artifacts(store.folder)
    assert answer.returncode == 0, answer.stderr
    named = artifacts("nowhere", "list", "--dir", store.folder).stdout
    assert [line.split()[0] for line in named.splitlines()] == [line.split()[0] for line in answer.stdout.splitlines()]
    header, *rows, total = answer.stdout.splitlines()
    assert header.split() == ["name", "kind", "stage", "size", "made", "last", "used", "inputs"]
    assert [row.split()[:2] for row in rows] == [[lineage[k].name, k] for k in ("final", "responses", "teacher")]
    assert rows[2].split()[2:4] == ["teacher", "dpo"] and rows[0].split()[-1] == "2"
    assert total.endswith(f"2.5 MB in {store.folder}")


def test_list_for_programs_holds_the_same_as_numbers(store, lineage):
    said = json.loads(artifacts(store.folder, "list", "--json").stdout)
    teacher = next(row for row in said["artifacts"] if row["kind"] == "teacher")
    sizes = {k: sum(f.stat().st_size for f in lineage[k].iterdir()) for k in ("final", "responses", "teacher")}
    assert teacher["bytes"] == sizes["teacher"] > 2_500_000 and said["bytes"] == sum(sizes.values())
    assert teacher["inputs"] == [lineage["rows"]] and not teacher["partial"] and teacher["maker"] is None


def test_an_interrupted_artefact_is_listed_with_its_recipe_and_what_is_left_of_it(store, start):
    killed_halfway(store, start, "resumable")
    name = f"{store.address('run', RECIPE).name}.partial"
    row = next(line for line in artifacts(store.folder).stdout.splitlines() if line.startswith(name))
    assert "teacher dpo" in row and row.endswith("partial: 1 file left")
    (store.folder / name / "checkpoint-8").mkdir()
    (store.folder / name / "checkpoint-16").mkdir()
    assert "partial: checkpoint-16 left" in artifacts(store.folder).stdout
    assert '"beta": 0.1' in artifacts(store.folder, "show", "run").stdout


def test_show_unfolds_what_an_artefact_was_made_from_down_to_the_files_and_each_once(store, lineage):
    answer = artifacts(store.folder, "show", "fin")
    assert answer.returncode == 0, answer.stderr
    assert '"seed": 0' in answer.stdout
    tree = answer.stdout.split("made from\n")[1].splitlines()
    teacher, responses, final = (lineage[k].name for k in ("teacher", "responses", "final"))
    begins = [
        final,
        f"├── {teacher}",
        f"│   └── {lineage['rows']}",
        f"└── {responses}",
        f"    └── {teacher}  (see above)",
    ]
    assert len(tree) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(tree, begins, strict=True))


def test_prune_only_says_what_would_go_and_what_was_made_from_it_until_told_yes(store, lineage):
    said = artifacts(store.folder, "prune", "teach")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"would remove {lineage['teacher'].name}  2.5 MB")
    assert f"in the lineage of {lineage['final'].name}, {lineage['responses'].name}: whole without it" in said.stdout
    assert "nothing is removed without --yes" in said.stdout and lineage["teacher"].is_dir()
    done = artifacts(store.folder, "prune", "teach", "--yes")
    assert "freed 2.5 MB" in done.stdout and not lineage["teacher"].exists()
    assert lineage["final"].is_dir() and lineage["responses"].is_dir()
    assert f"{lineage['teacher'].name}  no longer there" in artifacts(store.folder, "show", "final").stdout
    assert not list(store.folder.glob(".removed-*"))
    assert store.get_or_make("teacher", RECIPE, write("again")).is_dir()


def test_prune_takes_what_no_run_used_for_so_many_days_and_its_conditions_narrow_each_other_down(store, lineage):
    ten_days_ago = time.time() - 10 * 86400
    for name in ("teacher", "responses"):
        os.utime(lineage[name] / "used", (ten_days_ago, ten_days_ago))
    assert "nothing to remove" in artifacts(store.folder, "prune", "--unused-days", "11", "--yes").stdout
    artifacts(store.folder, "prune", "--unused-days", "9", "--kind", "responses", "--yes")
    assert {path.name for path in store.folder.iterdir() if path.is_dir()} == {
        lineage["teacher"].name,
        lineage["final"].name,
    }
    artifacts(store.folder, "prune", "--unused-days", "9", "--yes")
    assert {path.name for path in store.folder.iterdir() if path.is_dir()} == {lineage["final"].name}


def test_prune_leaves_what_a_living_process_makes_and_takes_it_when_that_was_killed(store, start, tmp_path):
    process = start(ASKS, store.folder, "resumable")
    wait_for(tmp_path / "calls")
    partial = store.address("run", RECIPE).with_suffix(".partial")
    kept = artifacts(store.folder, "prune", "--partial", "--yes")
    assert kept.returncode == 0, kept.stderr
    assert f"kept {partial.name}: in the hands of pid {process.pid} on {socket.gethostname()}" in kept.stdout
    assert (partial / "half").exists()
    process.kill()
    process.wait()
    assert "nothing to remove" in artifacts(store.folder, "prune", "--unused-days", "0", "--yes").stdout
    artifacts(store.folder, "prune", "--partial", "--yes")
    assert {path.name for path in store.folder.iterdir()} == {f"{partial.stem}.lock"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "re"], "re: no artefact of that name in"),
        (["show", "t"], "t: 2 artefacts begin so (teacher-"),
        (["prune"], "prune: says not what to remove; give names"),
        (["prune", "--kind", "sft"], "--kind=sft: none of that kind in"),
        (["prune", "--unused-days", "-1"], "-1: must be a number of days, 0 or more"),
        (["list", "--dir", "/nowhere/at/all"], "--dir=/nowhere/at/all: not a folder; name"),
        (["lost"], "invalid choice: 'lost'"),
    ],
)
def test_words_that_cannot_be_followed_are_refused_in_one_line(store, words, line):
    for seed in (1, 2):
        store.get_or_make("teacher", {"seed": seed}, write("t"))
    answer = artifacts(store.folder, *words)
    assert answer.returncode == 2 and line in answer.stderr.splitlines()[-1]
    assert answer.stdout == "" and "Traceback" not in answer.stderr
    assert len(store.artifacts()) == 2


def test_a_store_that_no_run_has_made_yet_is_empty_and_no_mistake(tmp_path):
    answer = artifacts(tmp_path / "none")
    assert answer.returncode == 0 and "nothing is kept here yet" in answer.stdout


def test_neither_store_command_nor_source_version_loads_torch_or_the_source_it_reads(start):
    script = """
import sys
import opd.artifacts.__main__
from opd.artifacts.store import source_version
source_version(["trainer.py", "objectives"])
print(sorted({"torch", "transformers", "pydantic", "opd.trainer", "opd.objectives"} & set(sys.modules)))
"""
    out, error = start(script).communicate(timeout=30)
    assert out.strip() == "[]", error


# --- digests


def settle(file):
    """As if it had been written an hour ago: a file that is being written is read again each time."""
    past = time.time_ns() - 3600 * 10**9
    os.utime(file, ns=(past, past))
    return file


def test_the_digest_of_a_file_is_that_of_its_bytes_whatever_its_name(store, tmp_path):
    content = bytes(range(256)) * 5000  # more than one block
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
        expected = hashlib.blake2b(content, digest_size=16).hexdigest()
        assert store.content_digest(tmp_path / name) == expected


def test_one_byte_or_one_name_makes_another_digest_of_a_folder_and_its_place_does_not(store, tmp_path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights").write_bytes(b"1234")
    seen = {store.content_digest(model)}
    (model / "sub" / "weights").write_bytes(b"1235")
    seen.add(store.content_digest(model))
    (model / "sub" / "weights").rename(model / "sub" / "heavier")
    seen.add(store.content_digest(model))
    (model / "sub" / "heavier").rename(model / "heavier")
    last = store.content_digest(model)
    seen.add(last)
    assert len(seen) == 4
    model.rename(tmp_path / "elsewhere")
    assert store.content_digest(tmp_path / "elsewhere") == last


def test_checkpoints_optimizer_state_and_hidden_files_are_not_content_but_linked_files_are(store, tmp_path):
    model = tmp_path / "model"
    (model / "checkpoint-4").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    before = store.content_digest(model)
    for name in (
        "checkpoint-4/model",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        ".lock",
        "artifact.json",
        "used",
    ):
        (model / name).write_text("x")
    assert store.content_digest(model) == before
    (tmp_path / "blob").write_text("weights")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    linked = store.content_digest(model)
    assert linked != before
    (tmp_path / "blob").write_text("weightz")
    assert store.content_digest(model) not in (before, linked)


def test_a_file_of_the_same_size_and_time_is_not_read_again_and_one_of_another_time_is(store, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    written = settle(file).stat().st_mtime_ns
    first = store.content_digest(file)
    file.write_bytes(b"9999")  # another content behind the same size and time: only reading could tell
    os.utime(file, ns=(written, written))
    assert store.content_digest(file) == first == Store(store.folder).content_digest(file)
    os.utime(file, ns=(written, written + 1))
    assert store.content_digest(file) == hashlib.blake2b(b"9999", digest_size=16).hexdigest()


def test_a_file_written_just_now_is_read_again_because_its_time_may_not_show_the_next_change(store, tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(b"1234")
    written = file.stat().st_mtime_ns
    first = store.content_digest(file)
    file.write_bytes(b"9999")
    os.utime(file, ns=(written, written))
    assert store.content_digest(file) != first


def test_digests_that_cannot_be_read_or_kept_are_made_again(store, tmp_path, caplog):
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    settle(file)
    expected = hashlib.blake2b(b"1234", digest_size=16).hexdigest()
    store.folder.mkdir()
    for broken in ("{", "[]", json.dumps({str(file.resolve()): "x"})):
        (store.folder / "digests.json").write_text(broken)
        assert store.content_digest(file) == expected
    nowhere = Store(file / "store")
    with caplog.at_level("WARNING", logger="opd"):
        assert nowhere.content_digest(file) == expected
    assert "digests are not kept" in caplog.text
    with pytest.raises(FileNotFoundError):
        store.content_digest(tmp_path / "missing")


def test_the_source_version_follows_names_and_text_of_the_named_source_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PACKAGE", tmp_path)
    (tmp_path / "objectives").mkdir()
    (tmp_path / "trainer.py").write_text("a = 1\n")
    (tmp_path / "objectives" / "fused.py").write_text("b = 1\n")
    named = ["trainer.py", "objectives"]
    first = source_version(named)
    (tmp_path / "objectives" / "notes.md").write_text("x")
    (tmp_path / "other.py").write_text("x")
    assert source_version(named) == source_version(reversed(named)) == first
    assert source_version([*named, "objectives/fused.py"]) == first
    (tmp_path / "trainer.py").write_text("a = 2\n")
    second = source_version(named)
    (tmp_path / "objectives" / "fused.py").rename(tmp_path / "objectives" / "loss.py")
    assert len({first, second, source_version(named)}) == 3


@pytest.mark.parametrize("path", ["missing.py", "missing", "artifacts/report.html.j2"])
def test_source_that_is_not_there_is_an_error_and_not_an_unchanging_version(path):
    with pytest.raises(ValueError, match=f"source_version: {path}: no Python source"):
        source_version(["trainer.py", path])
