"""Whole runs on data sets and streams: what they leave behind, and that a stream resumes where it was."""

import json

import pytest
from e2e.command import call
from e2e.model_folders import build_model, build_tokenizer
from own_rows import SAMPLES, questions, write_lines

OWN = ("train/loss", "train/grad_norm", "train/lr", "train/tokens", "data/dropped_fraction", "data/truncated_fraction")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "student", "llama", tokenizer=build_tokenizer())


def run(folder, student, *words):
    answer = call(
        f"run.dir={folder}",
        "method=sft",
        "model/student=path",
        f"model.student.path={student}",
        "model/teacher=none",
        "train.batch_size=2",
        "train.log_every_steps=1",
        "rollout.max_completion_tokens=4",
        "data.max_prompt_length=60",
        "data.max_completion_length=60",
        *words,
    )
    assert answer.code == 0, answer.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_a_preset_keeps_what_became_of_its_rows(tmp_path, student):
    words = ("data=capybara", f"data.path={SAMPLES / 'capybara'}", "train.max_steps=1", "data.eval_prompts=2")
    first = run(tmp_path / "run", student, *words)[0]
    assert first["step"] == 0
    assert (first["data/rows"], first["data/kept"], first["data/evaluation_in_train"]) == (4, 4, 1)
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["data"]["kept"] == 4 and "README.md" in record["hashes"]["data"]


def test_a_streaming_run_tells_what_it_drops_and_resumes_to_the_same_numbers(tmp_path, student):
    rows = [*questions(*range(12)), *({"prompt": "long " * 60, "completion": "x", "n": n} for n in range(3))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    words = ("data=file", f"data.path={path}", "data.streaming=true", "data.shuffle_buffer=4", "data.eval_prompts=2")
    words = (*words, "train.max_steps=8", "train.save_every_steps=4", "train.lr_scheduler=constant")
    whole = [line for line in run(tmp_path / "whole", student, *words) if "train/loss" in line]
    assert [line["step"] for line in whole] == list(range(1, 9))
    assert 0 < sum(line["data/dropped_fraction"] for line in whole) < 8
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    again = run(tmp_path / "again", student, *words, f"run.resume={checkpoint}")
    again = [line for line in again if "train/loss" in line]
    assert [line["step"] for line in again] == [5, 6, 7, 8]
    assert [[line[name] for name in OWN] for line in again] == [[line[name] for name in OWN] for line in whole[4:]]
