"""torchrun -m opd and accelerate launch -m opd: one of the processes reads the command, each is one rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.commands import begin, faulty, fingerprint, finish, killed_at_its_start, losses

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opd")
ACCELERATE = (
    *("accelerate.commands.launch", "--config_file", ROOT / "launchers/accelerate/cpu_2rank.yaml"),
    *("--main_process_port", "0", "-m", "opd"),
)
TWO = "hardware=cpu_2rank"


@pytest.fixture(scope="module")
def own(tmp_path_factory, student, teacher, rows):
    """What `python -m opd` itself makes of it."""
    from launch.commands import words_of

    folder = tmp_path_factory.mktemp("own") / "run"
    code, said = finish(begin("opd", *words_of(folder, student, teacher, rows, TWO)))
    assert code == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=["torchrun", "accelerate"]
)
def test_another_launcher_trains_what_opd_trains_by_itself(launcher, own, words, tmp_path):
    code, said = finish(begin(*launcher, *words("run", TWO), cwd=tmp_path))
    assert code == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # one process composed it
    assert said.count("Samples before training") == 1
    assert losses(tmp_path / "run") == losses(own)
    assert fingerprint(tmp_path / "run") == fingerprint(own)


@pytest.mark.slow
def test_the_rank_that_failed_is_named_under_torchrun_too(words, tmp_path):
    env = faulty(tmp_path, rank=1, fault='raise ValueError("a bug of rank 1")')
    code, said = finish(begin(*TORCHRUN, *words(tmp_path / "run", TWO), env=env))
    assert code == 1
    ours = said[: said.index("opd: rank 1 on ")]
    assert ours.count("Traceback") == 1 and ours.endswith("ValueError: a bug of rank 1\n"), said


@pytest.mark.slow
def test_a_rank_that_fails_before_it_has_joined_does_not_leave_the_others_waiting(words, tmp_path):
    env = killed_at_its_start(tmp_path, rank=1)
    code, said = finish(begin(*TORCHRUN, *words(tmp_path / "run", TWO), env=env), 120)
    assert code == 1
    assert re.search(r"^opd: rank 1 on \S+ was ended by SIGKILL", said, re.MULTILINE), said


@pytest.mark.slow
def test_processes_that_torchrun_starts_once_more_find_each_other_and_not_what_was_said_before(words, tmp_path):
    fault = 'if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": raise ValueError("once")'
    launcher = (*TORCHRUN[:1], "--max-restarts", "1", *TORCHRUN[1:])
    env = faulty(tmp_path, rank=1, fault=fault)
    code, said = finish(begin(*launcher, *words(tmp_path / "run", TWO), env=env), 180)
    assert code == 0, said
    assert "ValueError: once" in said
    assert "seconds" in json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (
            ["hardware=cpu_tiny"],
            2,
            "opd: hardware=cpu_tiny: 1 x 1 processes, and torchrun or accelerate launch started 2",
        ),
        pytest.param(
            *(["-m", TWO, "method.beta=0,1"], 2, "opd: -m: torchrun and accelerate launch start one run"),
            marks=pytest.mark.slow,
        ),
        (["method.bta=0"], 2, "opd: method.bta: unknown key; did you mean method.beta?"),
        pytest.param(["--cfg", "job"], 0, "name: gkd", marks=pytest.mark.slow),
    ],
    ids=["number", "sweep", "typo", "cfg"],
)
def test_one_process_answers_and_all_end(more, code, expected, tmp_path):
    """torchrun says 1 for whatever its processes say that is not 0."""
    ended, said = finish(begin(*TORCHRUN, *more, cwd=tmp_path))
    assert bool(ended) == bool(code), said
    assert said.count(expected) == 1, said
    assert f"exitcode  : {code}" in said or not code, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "hardware.sharding=ddp: accelerate launch was told to use DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "hardware.sharding=ddp: accelerate launch was told to use FSDP"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "hardware.precision=fp32: accelerate launch was told bf16"),
    ],
)
def test_what_accelerate_was_told_may_not_contradict_hardware(name, value, line, words, tmp_path, monkeypatch):
    import socket

    from e2e.command import call

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), name: value}
    for key, text in told.items():
        monkeypatch.setenv(key, text)
    answer = call(*words(tmp_path / "run", "hardware=cpu_tiny"))
    assert answer.code == 2
    assert len(answer.lines) == 1 and answer.stderr.startswith(f"opd: {line}; set it to "), answer.stderr
