"""What is told and kept between two lines of metrics: nothing is lost, nothing told twice, nothing broken saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from contract.tiny import make_model, make_trainer, train
from contract.variants import DEFAULTS, VARIANTS, tiny_config
from opd.errors import RunError

OF_ROLLOUTS = ("rollout/length_mean", "rollout/truncated_fraction")


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_a_line_is_about_every_step_since_the_last_one_and_the_last_step_has_a_line(variant):
    each = train(tiny_config(variant, train={"log_every_steps": 1}), steps=5).metrics
    pairs = train(tiny_config(variant, train={"log_every_steps": 2}), steps=5).metrics
    assert len(each) == 5 and len(pairs) == 3
    for line, steps in zip(pairs, ([0, 1], [2, 3], [4]), strict=True):
        for name in ("train/loss", "rollout/on_policy"):
            assert line[name] == pytest.approx(sum(each[i][name] for i in steps) / len(steps), rel=1e-5), name
        for name in [name for name in OF_ROLLOUTS if name in line]:  # a step counts by how many rollouts it has
            shares = [each[i]["rollout/on_policy"] for i in steps]
            whole = sum(each[i].get(name, 0.0) * share for i, share in zip(steps, shares, strict=True))
            assert line[name] == pytest.approx(whole / sum(shares), rel=1e-5), name
        tokens = [each[i]["train/tokens"] for i in steps]
        if "train/entropy" in line:
            weighted = sum(each[i]["train/entropy"] * n for i, n in zip(steps, tokens, strict=True)) / sum(tokens)
            assert line["train/entropy"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize(
    "variant", [v if v in DEFAULTS else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS], ids=str
)
def test_a_checkpoint_between_two_lines_changes_no_line_of_the_run_that_continues(variant, tmp_path):
    config = tiny_config(variant, train={"log_every_steps": 4, "save_every_steps": 3}, run={"dir": str(tmp_path)})
    whole = train(config, steps=6)
    trainer, again = make_trainer(config, student=make_model("llama", 1), steps=6)
    trainer.resume(tmp_path / "checkpoint-3")
    assert again.named == whole.named[1:] and len(again.named) == 2
    mine, theirs = again.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.items())
    if variant in DEFAULTS:
        lines = train(tiny_config(variant), steps=6).metrics
        assert trainer.spent["tokens"] == sum(line["train/tokens"] for line in lines)


def diverging(tmp_path, variant, **settings):
    rate = {"learning_rate": 1e38, "optimizer": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0, "warmup_ratio": 0.0}
    config = tiny_config(
        variant, train={**rate, "log_every_steps": 10, "save_every_steps": 1}, run={"dir": str(tmp_path)}
    )
    student = make_model("llama", 1)
    return make_trainer(config, student=student, **settings)[0], student


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_a_loss_that_is_no_number_ends_the_run_at_its_step_though_no_line_is_due(variant, tmp_path):
    trainer, _ = diverging(tmp_path, variant, steps=4)
    with pytest.raises(RunError, match=r"step \d: .*lower train\.learning_rate=1e\+38"):
        trainer.resume(None)
    for saved in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


@pytest.mark.parametrize("save", [0, 1])
def test_weights_that_the_last_step_broke_are_neither_saved_nor_called_trained(save, tmp_path):
    def break_a_weight():
        student.get_input_embeddings().weight.data[5, 0] = float("nan")

    trainer, student = diverging(tmp_path, DEFAULTS[0], steps=1, after_step=break_a_weight)
    trainer.args.save_steps = save or 10
    with pytest.raises(RunError, match=r"step 1: .*embed.* is no longer finite"):
        trainer.resume(None)
    assert not list(tmp_path.glob("checkpoint-*"))
