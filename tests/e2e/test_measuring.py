"""What a run measures while it trains: how often, where it lands, and that training does not notice."""

from __future__ import annotations

import json

import pytest
from contract.command import fingerprint, logged, train_losses

from e2e.command import call
from e2e.model_folders import file_run

STEPS = 6
WORDS = (f"train.max_steps={STEPS}", "method.lmbda=0.5", "train.learning_rate=0.01", "run.preflight=off")
DROPOUT = "model.student.lora={r:4,alpha:8,dropout:0.2,targets:all-linear}"  # draws from the global generator


@pytest.fixture
def trained(tmp_path, rows, student, teacher):
    def run(name, *more):
        answer = call(*file_run(tmp_path / name, rows, student, teacher, *WORDS, *more))
        assert answer.code == 0, answer.stderr
        return tmp_path / name

    return run


def steps_with(folder, prefix):
    return [line["step"] for line in logged(folder) if any(name.startswith(prefix) for name in line)]


def test_evaluations_during_training_land_at_their_steps_and_change_no_bit(trained):
    never = trained("never", "train.eval_every_steps=0", DROPOUT)
    often = trained("often", "train.eval_every_steps=2", DROPOUT)
    assert steps_with(never, "eval/") == [0, STEPS]
    assert steps_with(often, "eval/") == [0, 2, 4, STEPS]
    lines = [line for line in logged(often) if "eval/nll" in line]
    names = [{name for name in line if name.startswith("eval/")} for line in lines]
    assert all(found == names[0] for found in names)
    assert len({line["eval/nll"] for line in lines}) == len(lines)  # the student moves, and is measured as it is
    assert train_losses(often) == train_losses(never)
    assert fingerprint(often) == fingerprint(never)
    after = json.loads((often / "result.json").read_text())["after"]
    assert after == json.loads((never / "result.json").read_text())["after"]


def test_an_evaluation_during_training_is_that_of_the_checkpoint_of_its_step(trained, tmp_path, rows, teacher):
    run = trained("run", "train.eval_every_steps=3", "train.save_every_steps=3")
    words = file_run(tmp_path / "eval", rows, run / "checkpoint-3", teacher, *WORDS, "mode=eval")
    assert call(*words).code == 0
    (during,) = [line for line in logged(run) if line["step"] == 3 and "eval/nll" in line]
    again = json.loads((tmp_path / "eval" / "result.json").read_text())["evaluation"]
    assert {f"eval/{name}": value for name, value in again.items()} == pytest.approx(
        {name: value for name, value in during.items() if name != "step"}, rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("every", "shown"), [(1, list(range(1, STEPS + 1))), (0, []), (4, [4])])
def test_rollouts_are_written_as_often_as_asked(trained, every, shown):
    folder = trained("run", f"train.sample_every_steps={every}", "train.log_every_steps=100")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in samples if line["phase"] == "train"}) == shown
    assert {line["phase"] for line in samples} == ({"before", "train", "after"} if shown else {"before", "after"})
    # A step whose rollouts are written is logged, and so is the last.
    assert [step for step, _ in train_losses(folder)] == sorted({*shown, STEPS})


def test_every_steps_loss_and_gradient_norm_are_logged_when_asked(trained):
    lines = logged(trained("run", "train.log_every_steps=1", "train.sample_every_steps=0"))
    told = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert all(line["train/grad_norm"] > 0 for line in told)


@pytest.mark.slow
def test_how_often_a_run_logs_changes_no_bit_of_it(trained):
    folders = [trained(f"every{n}", f"train.log_every_steps={n}", f"train.sample_every_steps={n - 1}") for n in (1, 3)]
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    assert dict(train_losses(folders[0])).keys() >= dict(train_losses(folders[1])).keys()
