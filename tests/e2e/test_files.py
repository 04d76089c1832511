"""Real input: model folders of six families and files of five formats, from the command to what a run leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.command import ENVIRONMENT, call, shell
from e2e.model_folders import build_model, file_run, write_rows

PROMISED = {
    "config.yaml",
    "provenance.json",
    "training.log",
    "metrics.jsonl",
    "samples.jsonl",
    "result.json",
    "report.md",
    "report.html",
    "final_model",
}
ON_POLICY = ("method.lmbda=1",)


def check_run(run: Path, *, steps: int = 2) -> dict:
    """Everything a run folder promises is there, and the final model answers; returns result.json."""
    assert {path.name for path in run.iterdir()} >= PROMISED
    assert not list(run.glob(".*"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in trained] == list(range(1, steps + 1))
    for record in trained:
        assert isinstance(record["train/loss"], float)
        assert record["train/grad_norm"] > 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {"before", "after"} <= {sample["phase"] for sample in samples}
    assert all({"prompt", "completion", "step"} <= sample.keys() for sample in samples)
    result = json.loads((run / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys()
    assert result["seconds"] > 0
    assert json.loads((run / "provenance.json").read_text())["data"]["kept"] > 0
    assert "<html" in (run / "report.html").read_text()
    assert (run / "report.md").read_text().startswith("#")
    check_logits(run / "final_model")
    return result


def check_logits(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("What is 2 plus 2?", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("family", "suffix", "more"),
    [
        ("llama", ".csv", ()),
        ("qwen2", ".parquet", ("method=sft",)),
        pytest.param("qwen3", ".txt", ON_POLICY, marks=pytest.mark.slow),
        pytest.param("gpt2", ".json", (), marks=pytest.mark.slow),
        ("gpt2", ".txt", ("method=reverse_kl",)),
        pytest.param("mistral", ".jsonl", ("method.lmbda=0", "method.seq_kd=true"), marks=pytest.mark.slow),
        ("gemma2", ".txt", ("method=reverse_kl", "model.student.attention=eager", "model.teacher.attention=eager")),
    ],
)
def test_a_model_folder_and_a_file_are_enough_for_a_run(tmp_path, family, suffix, more):
    student, teacher = build_model(tmp_path / "student", family), build_model(tmp_path / "teacher", family, seed=1)
    words = file_run(tmp_path / "run", write_rows(tmp_path / f"rows{suffix}"), student, teacher, *more)
    words += ["train.batch_size=4", "rollout.group_size=1", "train.save_every_steps=1"]
    answer = call(*words)
    assert answer.code == 0, answer.stderr
    result = check_run(tmp_path / "run")
    assert {"forward_kl", "reverse_kl"} <= result["after"].keys()
    # Held-out completions are scored whether or not the method learns from completions.
    assert ("nll" in result["after"]) == (suffix != ".txt")
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


def test_a_family_without_the_asked_attention_is_refused_with_the_one_that_works(tmp_path):
    student = build_model(tmp_path / "student", "gemma2")
    answer = call(*file_run(tmp_path / "run", write_rows(tmp_path / "rows.csv"), student, None, "method=sft"))
    if answer.code:  # where transformers supports it, it simply runs
        assert answer.code == 2
        assert answer.stderr.startswith("opd: model.student.attention=sdpa: ")
        assert "set it to eager" in answer.stderr


def test_fine_tuning_needs_no_teacher_and_no_template(tmp_path):
    student, rows = build_model(tmp_path / "student", "gpt2"), write_rows(tmp_path / "rows.csv")
    assert call(*file_run(tmp_path / "run", rows, student, None, "method=sft", "train.batch_size=4")).code == 0
    result = check_run(tmp_path / "run")
    assert "nll" in result["after"]
    assert "reverse_kl" not in result["after"]


def test_padded_vocabularies_of_different_width_are_compared_over_the_shared_ids(tmp_path, rows):
    student = build_model(tmp_path / "student", width=304)
    teacher = build_model(tmp_path / "teacher", width=320, seed=1)
    assert call(*file_run(tmp_path / "run", rows, student, teacher, *ON_POLICY)).code == 0
    result = check_run(tmp_path / "run")
    assert result["after"]["reverse_kl"] > 0
    # The padding is the model's own: it is neither cut off nor grown to the teacher's.
    assert json.loads((tmp_path / "run" / "final_model" / "config.json").read_text())["vocab_size"] == 304


def test_a_teacher_narrower_than_the_tokenizer_is_refused(tmp_path, rows, student):
    teacher = build_model(tmp_path / "teacher", width=270)
    answer = call(*file_run(tmp_path / "run", rows, student, teacher))
    assert answer.code == 2
    assert "heads share only 270 columns" in answer.stderr


def test_a_lora_student_leaves_its_adapter_and_the_merged_model_which_agree(tmp_path, rows, student, teacher):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:all-linear}"
    words = file_run(tmp_path / "run", rows, student, teacher, lora, "train.learning_rate=0.05", *ON_POLICY)
    assert call(*words).code == 0
    run = tmp_path / "run"
    check_run(run)
    base = AutoModelForCausalLM.from_pretrained(student)
    merged = AutoModelForCausalLM.from_pretrained(run / "final_model")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        untrained = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "final_adapter")(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, untrained, atol=1e-3)


def test_columns_of_other_names_are_read_by_data_columns(tmp_path, student, teacher):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(20)))
    names = ["data.columns.prompt=question", "data.columns.completion=answer"]
    assert call(*file_run(tmp_path / "run", rows, student, teacher, *names)).code == 0
    assert "nll" in check_run(tmp_path / "run")["after"]


def test_a_path_may_begin_with_a_tilde(tmp_path, rows, student, teacher, monkeypatch):
    for name, place in {"rows.jsonl": rows, "student": student, "teacher": teacher}.items():
        (tmp_path / name).symlink_to(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(*file_run(*(f'"~/{name}"' for name in ("run", "rows.jsonl", "student", "teacher")))).code == 0
    check_run(tmp_path / "run")


def test_rows_that_are_dropped_or_cut_are_counted(tmp_path, student, teacher):
    rows = [(f"{n}?", "yes " * (8 if n == 0 else 1)) for n in range(20)] + [("why " * 40, "no")]
    words = file_run(tmp_path / "run", write_rows(tmp_path / "rows.csv", rows), student, teacher)
    assert call(*words, "data.max_prompt_length=60", "data.max_completion_length=12").code == 0
    data = json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]
    assert data["rows"] == 21
    assert data["dropped"] == {"prompt_too_long": 1}
    assert data["truncated"] == 1
    assert "prompt_too_long" in (tmp_path / "run" / "training.log").read_text()


# The second: what the advice after an out-of-memory begins with.
@pytest.mark.parametrize("more", [(), ("train.micro_batch_size=1", "model.student.gradient_checkpointing=true")])
def test_a_copied_checkpoint_can_be_named_to_continue_from(more, tmp_path, rows, student, teacher):
    first = file_run(tmp_path / "first", rows, student, teacher, *ON_POLICY, "train.save_every_steps=1")
    assert call(*first).code == 0
    kept = Path(shutil.copytree(tmp_path / "first" / "checkpoint-1", tmp_path / "kept" / "checkpoint-1"))
    second = file_run(tmp_path / "second", rows, student, teacher, *ON_POLICY, "train.save_every_steps=1")
    assert call(*second, *more, f"run.resume={kept}").code == 0
    after = [json.loads((tmp_path / name / "result.json").read_text())["after"] for name in ("first", "second")]
    assert after[0] == (pytest.approx(after[1], abs=1e-5) if more else after[1])


@pytest.mark.slow
def test_an_interrupted_command_says_so_continues_when_repeated_and_is_refused_when_finished(
    tmp_path, rows, student, teacher
):
    run = tmp_path / "run"
    words = file_run(run, rows, student, teacher, "train.max_steps=60", "train.save_every_steps=20", *ON_POLICY)
    command = [sys.executable, "-m", "opd", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In the background of a shell, as CI may run this, a process is born deaf to Ctrl-C.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes, **heard)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-20").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == f"interrupted; the same command with run.dir={run} continues"
    assert (run / "training.log").read_text().splitlines()[-1].endswith("ERROR interrupted")
    assert "Traceback" not in told
    assert not (run / "final_model").exists()

    again = shell(*words)
    assert again.code == 0, again.stderr
    assert f"continues the interrupted run in {run} from step " in again.stdout
    check_run(run, steps=60)
    result = json.loads((run / "result.json").read_text())
    assert result["seconds"] > result["train_seconds"]  # both by both commands

    finished = shell(*words)
    assert finished.code == 2
    assert finished.lines == [
        f"opd: run.dir={run}: holds a finished run; choose another run.dir (its report: {run / 'report.html'})"
    ]
