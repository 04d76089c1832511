"""8-bit and 4-bit models by the command: students with an adapter learn on their own rollouts, resume and merge."""

from __future__ import annotations

import json

import pytest

from e2e.command import call, shell
from e2e.model_folders import build_model, file_run
from e2e.pair_rows import LORA, pair_run, read_metrics, write_pairs
from e2e.test_files import check_run

pytest.importorskip("bitsandbytes")

BITS = ("8bit", "4bit")
ONE_QUICKLY = [pytest.param("8bit", marks=pytest.mark.slow), "4bit"]
STEADY = ("train.warmup_steps=0", "train.lr_scheduler=constant", "train.learning_rate=0.02")
LEARNING = (LORA, "method.lmbda=1", "run.preflight=off", *STEADY)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return build_bold(tmp_path_factory.mktemp("student") / "model", seed=0)


@pytest.fixture(scope="module")
def bold_teacher(tmp_path_factory):
    return build_bold(tmp_path_factory.mktemp("teacher") / "model", seed=1)


def build_bold(folder, seed):
    """A model with an opinion: its distributions are far from uniform, so that adapters can change them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build_model(folder, seed=seed))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    model.save_pretrained(folder)
    return folder


def quantized(bits):
    return f"model.student.quantization={bits}"


def trained(folder):
    return [record for record in read_metrics(folder) if "train/loss" in record]


@pytest.mark.parametrize(
    ("bits", "precision"),
    [
        ("4bit", "fp32"),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("8bit", "fp32"), ("4bit", "bf16"))),
    ],
)
def test_a_quantized_student_learns_on_its_rollouts(tmp_path, rows, student, bold_teacher, bits, precision):
    more = (*LEARNING, quantized(bits), f"hardware.precision={precision}", "train.max_steps=20", "train.batch_size=16")
    words = file_run(tmp_path / "run", rows, student, bold_teacher, *more, f"model.teacher.quantization={bits}")
    answer = call(*words)
    assert answer.code == 0, answer.stderr
    result = check_run(tmp_path / "run", steps=20)
    assert result["after"]["reverse_kl"] < 0.8 * result["before"]["reverse_kl"]
    assert all(record["rollout/on_policy"] == 1 for record in trained(tmp_path / "run"))
    # What was evaluated is what the merged model says.
    again = file_run(tmp_path / "again", rows, tmp_path / "run" / "final_model", bold_teacher, "mode=eval")
    assert call(*again, f"model.teacher.quantization={bits}", f"hardware.precision={precision}").code == 0
    measured = read_metrics(tmp_path / "again")[0]["eval/reverse_kl"]
    assert measured == pytest.approx(
        result["after"]["reverse_kl"], rel=1e-4 if (bits, precision) == ("4bit", "fp32") else 0.1
    )
    assert "quantization_config" not in json.loads((tmp_path / "run" / "final_model" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ONE_QUICKLY)
def test_a_resumed_quantized_run_is_the_whole_one(tmp_path, rows, student, bold_teacher, bits):
    more = (*LEARNING, quantized(bits), "train.max_steps=4", "train.save_every_steps=2")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert call(*file_run(whole, rows, student, bold_teacher, *more)).code == 0
    assert not (whole / "checkpoint-2" / "model.safetensors").exists()  # the adapter alone
    words = file_run(resumed, rows, student, bold_teacher, *more, f"run.resume={whole / 'checkpoint-2'}")
    assert call(*words).code == 0
    wanted = [record for record in read_metrics(whole) if record["step"] > 2]
    assert [record for record in read_metrics(resumed) if record["step"] > 2] == wanted


@pytest.mark.parametrize("bits", ONE_QUICKLY)
def test_the_reference_of_a_quantized_student_is_where_it_began(tmp_path, student, bits):
    """The base with a new adapter off, or a copy of the student where its adapter goes on."""
    pairs, more = write_pairs(tmp_path / "pairs.jsonl"), ("method=dpo", quantized(bits), "train.learning_rate=0.02")
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(*pair_run(first, pairs, student, None, *more, LORA)).code == 0
    assert call(*pair_run(second, pairs, first / "final_adapter", None, *more)).code == 0
    for folder in (first, second):
        margins = [record["eval/reward_margin"] for record in read_metrics(folder) if "eval/reward_margin" in record]
        assert margins[0] == 0 and abs(margins[-1]) > 1e-4
    ends = [read_metrics(first)[-1]["eval/nll"], read_metrics(second)[0]["eval/nll"]]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_two_ranks_train_a_quantized_student_as_one_does(tmp_path, rows, student, bold_teacher, bits):
    losses = []
    for name, hardware in (("one", "cpu_tiny"), ("two", "cpu_2rank")):
        more = (*LEARNING, quantized(bits), f"hardware={hardware}", "train.max_steps=3", "train.micro_batch_size=2")
        answer = shell(*file_run(tmp_path / name, rows, student, bold_teacher, *more))
        assert answer.code == 0, answer.stderr
        losses.append([record["train/loss"] for record in trained(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if bits == "8bit" else 1e-4)


REFUSED = {
    "model.student.quantization=8bit": "model.student.quantization=8bit: quantized weights cannot be trained; add "
    "model/adapter=lora, or set it to null",
    "model.teacher.attention=flash_attention_2": "model.teacher.attention=flash_attention_2: has no kernel for "
    "hardware.device=cpu; set it to sdpa",
    "model.student.quantization=3bit": "model.student.quantization='3bit': must be '8bit' or '4bit'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_computed_is_refused_before_anything_is_loaded(tmp_path, rows, student, teacher, words):
    answer = call(*file_run(tmp_path / "run", rows, student, teacher, *words.split()))
    assert (answer.code, answer.lines) == (2, [f"opd: {REFUSED[words]}"])
    assert not (tmp_path / "run").exists()


def test_quantized_weights_in_a_folder_are_refused_without_an_adapter(tmp_path, rows, student, teacher):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opd.quantization import quantization_config

    settings = {"quantization_config": quantization_config("4bit", compute="float32"), "dtype": "float32"}
    folder = tmp_path / "quantized"
    AutoModelForCausalLM.from_pretrained(student, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    answer = call(*file_run(tmp_path / "run", rows, folder, teacher))
    told = (
        f"opd: model.student.path={folder}: its weights are quantized, which cannot be trained; add model/adapter=lora"
    )
    assert (answer.code, answer.lines) == (2, [told])
    assert call(*file_run(tmp_path / "run", rows, folder, teacher, *LEARNING)).code == 0
    check_run(tmp_path / "run")
