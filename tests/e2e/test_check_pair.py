"""`mode=check` as a command: exit 0 where nothing stands against a training, 3 with the list where something does."""

from __future__ import annotations

import pytest

from e2e.command import call, snapshot
from e2e.model_folders import build_model, build_tokenizer, file_run, write_rows


@pytest.fixture
def stranger(tmp_path):
    return build_model(tmp_path / "stranger", tokenizer=build_tokenizer(reverse=True))


def check(*words):
    return call("mode=check", *words)


def test_a_healthy_pair_passes_and_nothing_is_written(tmp_path, student, teacher, rows):
    before = snapshot(tmp_path)
    answer = check(*file_run(tmp_path / "run", rows, student, teacher))
    assert answer.code == 0, answer.stderr
    assert f"pair.verdict: same-tokenizer methods: {teacher} as teacher of {student}" in answer.stdout + answer.stderr
    assert snapshot(tmp_path) == before


def test_a_same_size_teacher_with_another_tokenizer_is_told_once_and_exits_3(tmp_path, student, stranger, rows):
    answer = check(*file_run(tmp_path / "run", rows, student, stranger))
    assert answer.code == 3
    (line,) = [line for line in answer.lines if line.startswith("opd: ")]
    assert f"error pair.tokenizer: model.teacher.path={stranger}" in line
    told = answer.stdout + answer.stderr
    assert "pair.verdict: only gold" in told and "nothing beyond this refusal is checked yet" in told
    assert "error config" not in told


def test_what_only_the_loading_refuses_is_told_too(tmp_path, student, teacher, rows):
    answer = check(*file_run(tmp_path / "run", rows, student, teacher, "train.batch_size=64"))
    assert answer.code == 3
    (line,) = [line for line in answer.lines if line.startswith("opd: ")]
    assert line.startswith("opd: error config: train.batch_size=64: the data has only 16 training rows")


def test_the_embedded_task_passes(tmp_path):
    tiny = [f"model.{role}.recipe.{key}" for role in ("student", "teacher") for key in ("steps=1", "batch_size=8")]
    answer = check(*tiny, "data.limit=64", "data.eval_prompts=8", f"run.dir={tmp_path / 'run'}")
    assert answer.code == 0, answer.stderr
    told = answer.stdout + answer.stderr
    assert "same-tokenizer methods" in told
    assert "warning pair." not in told and "warning data." not in told


def test_rows_on_both_sides_of_a_split_stop_a_training_before_a_weight_is_loaded(
    tmp_path, student, teacher, monkeypatch
):
    from opd.data import own

    rows = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(own, "split_evaluation", lambda examples, *_, **__: (examples, examples))
    monkeypatch.setattr("opd.pipeline.load_trained_student", lambda *_: pytest.fail("weights were loaded"))
    answer = call(*file_run(tmp_path / "run", rows, student, teacher))
    assert answer.code == 3
    assert "error data.leakage: 20 of 20 evaluation prompts are trained on too" in answer.stderr


def test_a_training_tells_warnings_and_goes_on(tmp_path, student, rows):
    teacher = build_model(tmp_path / "teacher", seed=1)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "### ")
    tokenizer.save_pretrained(teacher)
    answer = call(*file_run(tmp_path / "run", rows, student, teacher, "train.max_steps=1", "method.lmbda=0"))
    assert answer.code == 0, answer.stderr
    assert "warning pair.template: model.teacher.path" in answer.stdout + answer.stderr
