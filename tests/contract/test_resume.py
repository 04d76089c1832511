"""A run that was killed and started again is, to the bit, the run that was not."""

from __future__ import annotations

import random
import time

import pytest

from contract.command import fingerprint, logged, start, train_losses, words_of, write_inputs
from contract.variants import DEFAULTS, VARIANTS, needs_of

STEPS, EVERY = 12, 5  # an odd interval: a batch of rollouts for two steps is half used at every checkpoint
TIMES = (f"train.max_steps={STEPS}", f"train.save_every_steps={EVERY}", "train.keep_checkpoints=2")
LORA = "model.student.lora={r: 4, alpha: 8, dropout: 0.1, targets: all-linear}"
# In the default suite: several steps of one batch of rollouts, an average of the weights, and kept scores.
SUBSTEPS = next(variant for variant in VARIANTS if needs_of(variant).num_substeps > 1)
AVERAGING = next(v for v in VARIANTS if any(need.model == "ema" for need in needs_of(v).teachers.values()))
PRECOMPUTING = next(v for v in VARIANTS if any(need.precompute for need in needs_of(v).teachers.values()))
SAMPLING = next(variant for variant in DEFAULTS if needs_of(variant).rollouts)
KILLED = (SUBSTEPS, AVERAGING, PRECOMPUTING)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def kill_after(step, command, folder):
    """SIGKILL as soon as metrics.jsonl tells of this step."""
    deadline = time.monotonic() + 120
    while max((done for done, _ in train_losses(folder)), default=0) < step:
        assert command.process.is_alive() and time.monotonic() < deadline, command.said[-3000:]
        time.sleep(0.002)
    command.kill()


def assert_kill_and_resume_is_exact(variant, inputs, tmp_path, *more):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(words_of(variant, inputs, whole, *TIMES, *more), tmp_path / "whole.log")
    command = start(words_of(variant, inputs, broken, *TIMES, *more), tmp_path / "broken.log")
    kill_after(random.Random(str(variant)).randint(EVERY + 1, 2 * EVERY - 1), command, broken)
    uninterrupted.finish()
    assert not (broken / "final_model").exists()
    saved = sorted(int(path.name.split("-")[1]) for path in broken.glob("checkpoint-*"))
    assert saved[0] == EVERY
    # What a kill in the middle of a save leaves behind.
    half = broken / ".saving" / "checkpoint-999"
    half.mkdir(parents=True, exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")

    again = start(words_of(variant, inputs, broken, *TIMES, *more), tmp_path / "again.log").finish()
    assert f"continues the interrupted run in {broken} from step {saved[-1]}" in again.said
    losses = train_losses(whole)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert train_losses(broken) == losses
    assert fingerprint(broken) == fingerprint(whole)
    assert not half.exists()
    return whole, broken


@pytest.mark.parametrize("variant", KILLED, ids=str)
def test_a_killed_run_continues_to_the_bit(variant, inputs, tmp_path):
    """Rollouts for two steps are half used at the checkpoint; the average has moved; scores were kept before."""
    whole, broken = assert_kill_and_resume_is_exact(variant, inputs, tmp_path)
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in logged(folder)] for folder in (whole, broken)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_killed_run_of_adapters_with_dropout_continues_to_the_bit(inputs, tmp_path):
    assert_kill_and_resume_is_exact(SAMPLING, inputs, tmp_path, LORA)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v not in KILLED], ids=str)
def test_every_killed_run_continues_to_the_bit(variant, inputs, tmp_path):
    assert_kill_and_resume_is_exact(variant, inputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v is not SAMPLING], ids=str)
def test_every_killed_run_of_adapters_continues_to_the_bit(variant, inputs, tmp_path):
    assert_kill_and_resume_is_exact(variant, inputs, tmp_path, LORA)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(inputs, tmp_path):
    variant, folder, whole = SAMPLING, tmp_path / "broken", tmp_path / "whole"
    command = start(words_of(variant, inputs, folder, *TIMES), tmp_path / "broken.log")
    kill_after(2, command, folder)
    for checkpoint in folder.glob("checkpoint-*"):  # the kill came late
        checkpoint.rename(tmp_path / checkpoint.name)
    start(words_of(variant, inputs, folder, *TIMES), tmp_path / "again.log").finish()
    start(words_of(variant, inputs, whole, *TIMES), tmp_path / "whole.log").finish()
    assert train_losses(folder) == train_losses(whole) and fingerprint(folder) == fingerprint(whole)


@pytest.mark.slow
def test_the_command_itself_is_killed_and_continues(inputs, tmp_path):
    """As users do it: python -m opd, kill -9, the same line again."""
    import os
    import subprocess
    import sys

    from contract.variants import ROOT

    words = [sys.executable, "-m", "opd", *words_of(SUBSTEPS, inputs, tmp_path / "run", *TIMES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while max((step for step, _ in train_losses(tmp_path / "run")), default=0) < EVERY + 1:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "continues the interrupted run" in again.stdout + again.stderr
    start(words_of(SUBSTEPS, inputs, tmp_path / "whole", *TIMES), tmp_path / "whole.log").finish()
    assert train_losses(tmp_path / "run") == train_losses(tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
