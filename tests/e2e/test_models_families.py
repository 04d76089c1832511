"""The families that the presets name, as random tiny folders: each loads, learns from a teacher and is left usable."""

from __future__ import annotations

import json

import pytest

from e2e.command import call
from e2e.model_folders import build_model, build_tokenizer, file_run
from e2e.pair_rows import LORA, read_metrics
from e2e.test_files import check_run

ELSEWHERE = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")  # other tests of the default suite train the first four


@pytest.mark.parametrize(
    "family", ["qwen3", "opt", *(pytest.param(name, marks=pytest.mark.slow) for name in ELSEWHERE)]
)
def test_a_family_takes_on_policy_steps_towards_a_teacher(tmp_path, rows, family):
    student, teacher = build_model(tmp_path / "student", family), build_model(tmp_path / "teacher", family, seed=1)
    words = file_run(tmp_path / "run", rows, student, teacher, "method.lmbda=1", "train.learning_rate=0.01")
    answer = call(*words, "train.warmup_steps=0")
    assert answer.code == 0, answer.stderr
    result = check_run(tmp_path / "run")
    assert 0 < result["after"]["reverse_kl"] != result["before"]["reverse_kl"]


@pytest.mark.parametrize(
    "family", [pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("opt", marks=pytest.mark.slow), "qwen3"]
)
def test_a_family_takes_an_adapter_with_gradient_checkpointing(tmp_path, rows, family):
    student, teacher = build_model(tmp_path / "student", family), build_model(tmp_path / "teacher", family, seed=1)
    more = (LORA, "train.learning_rate=0.01", "train.warmup_steps=0", "method.lmbda=1")
    losses = []
    for name in ("plain", "checkpointing"):
        words = file_run(tmp_path / name, rows, student, teacher, *more)
        answer = call(*words, f"model.student.gradient_checkpointing={name != 'plain'}".lower())
        assert answer.code == 0, answer.stderr
        check_run(tmp_path / name)
        trained = [record for record in read_metrics(tmp_path / name) if "train/loss" in record]
        losses.append([record[name] for record in trained for name in ("train/loss", "train/grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_padded_tables_of_two_sizes_over_one_tokenizer_train(tmp_path, rows):
    """As Qwen2.5 0.5B and 7B: 151,936 and 152,064 rows over one tokenizer."""
    student = build_model(tmp_path / "student", "qwen2", width=320)
    teacher = build_model(tmp_path / "teacher", "qwen2", width=352, seed=1)
    more = ("method.lmbda=1", "train.max_steps=15", "train.learning_rate=0.01", "train.warmup_steps=0")
    answer = call(*file_run(tmp_path / "run", rows, student, teacher, *more, "train.batch_size=16"))
    assert answer.code == 0, answer.stderr
    result = check_run(tmp_path / "run", steps=15)
    assert result["after"]["reverse_kl"] < 0.8 * result["before"]["reverse_kl"]
    assert json.loads((tmp_path / "run" / "final_model" / "config.json").read_text())["vocab_size"] == 320


def test_a_tokenizer_of_the_same_size_with_other_tokens_is_refused(tmp_path, rows):
    student = build_model(tmp_path / "student", "qwen2", width=320)
    other = build_tokenizer(reverse=True)
    teacher = build_model(tmp_path / "teacher", "qwen2", width=320, seed=1, tokenizer=other)
    answer = call(*file_run(tmp_path / "run", rows, student, teacher))
    assert answer.code in (2, 3)
    (line,) = answer.lines
    assert f"model.teacher.path={teacher}" in line and "gold" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [pytest.param(("method=sft",), marks=pytest.mark.slow), ("method.lmbda=0", "method.seq_kd=true")],
    ids=" ".join,
)
def test_a_student_with_an_adapter_and_its_own_base_as_teacher_is_measured_by_it(tmp_path, rows, student, more):
    """The run says what the same run says with the base loaded twice. Learning from itself leaves the divergence at 0."""
    import shutil

    copied = shutil.copytree(student, tmp_path / "copied")
    metrics = []
    for name, teacher in (("shared", student), ("apart", copied)):
        words = file_run(tmp_path / name, rows, student, teacher, LORA, "run.preflight=warn", *more)
        answer = call(*words, "train.learning_rate=0.05", "train.warmup_steps=0")
        assert answer.code == 0, answer.stderr
        told = f"{student} (the student with its adapter off)"
        assert (told in (tmp_path / name / "training.log").read_text()) == (name == "shared")
        metrics.append(read_metrics(tmp_path / name))
    assert metrics[0] == metrics[1]
    assert metrics[0][0]["eval/forward_kl"] == pytest.approx(0, abs=1e-6)
    assert (metrics[0][-1]["eval/forward_kl"] > 1e-3) == (more == ("method=sft",))
