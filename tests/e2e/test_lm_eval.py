"""Tasks of lm-eval put to the student: local files, no network, and lm-eval's own numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from contract.command import fingerprint, train_losses

from e2e.command import call, shell
from e2e.model_folders import ROWS, build_model, build_tokenizer, file_run

LORA = "model.student.lora={r:8,alpha:16,dropout:0.0,targets:all-linear}"
CHOICE = """task: sums_choice
output_type: multiple_choice
doc_to_choice: "{{[answer, wrong]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWER = """task: sums_answer
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: strict, filter: [{function: take_first}]}]
"""


def write_task(folder: Path, text: str, name: str = "task") -> Path:
    documents = folder / "documents.jsonl"
    if not documents.exists():
        wrong = [f"{a.rpartition(' ')[0]} {int(a.split()[-1][:-1]) - 1}." for _, a in ROWS]
        records = [{"question": q, "answer": a, "wrong": w} for (q, a), w in zip(ROWS, wrong, strict=True)]
        documents.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = folder / f"{name}.yaml"
    place = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\ntest_split: test\n"
    file.write_text(place + 'doc_to_text: "{{question}}"\n' + text)
    return file


def asked(*files: Path | str) -> str:
    return f"evaluation.lm_eval.tasks=[{','.join(map(str, files))}]"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_task(folder, CHOICE, "choice"), write_task(folder, ANSWER, "answer")


LONG = ("train.max_steps=200", "train.batch_size=16", "train.micro_batch_size=16", "train.learning_rate=0.02")
UNCHECKED = "run.preflight=off"  # whether these trainings are any good is another test's
QUICK = (
    "evaluation.greedy=false",
    "evaluation.sampled=false",
    "evaluation.divergence=false",
    "train.log_every_steps=50",
    UNCHECKED,
)


@pytest.fixture(scope="module")
def expert(tmp_path_factory, rows, student):
    """A model that knows the sums."""
    run = tmp_path_factory.mktemp("expert") / "run"
    answer = call(*file_run(run, rows, student, None, "method=sft", "data.eval_prompts=0", *LONG, *QUICK))
    assert answer.code == 0, answer.stderr
    return run / "final_model"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, rows, student, expert, tasks):
    """A run that distils it, asked before and after."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    words = file_run(run, rows, student, expert, "method.lmbda=0", *LONG, *QUICK, asked(*tasks))
    answer = call(*words, "data.eval_prompts=4")
    assert answer.code == 0, answer.stderr
    return run, answer


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_distillation_shows_in_the_tasks_before_and_after(distilled):
    run, answer = distilled
    before, after = result_of(run)["before"], result_of(run)["after"]
    assert before["lm_eval/sums_answer/exact_match/strict"] == 0
    assert after["lm_eval/sums_answer/exact_match/strict"] >= 0.7  # 16 of the 20 documents were trained on
    assert after["lm_eval/sums_choice/acc"] >= 0.75 > before["lm_eval/sums_choice/acc"]
    (row,) = [line for line in answer.stdout.splitlines() if "lm_eval/sums_answer" in line]
    assert "↑" in row and row.endswith("better")
    for report in ("report.md", "report.html"):
        assert "lm_eval/sums_choice/acc" in (run / report).read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (first, last) = [line for line in lines if "eval/lm_eval/sums_choice/acc" in line]
    assert (first["step"], last["step"]) == (0, 200)
    assert last["eval/lm_eval/sums_choice/acc"] == after["lm_eval/sums_choice/acc"]


def test_every_documents_answer_and_score_is_kept(distilled):
    run, _ = distilled
    for phase in ("before", "after"):
        records = [json.loads(line) for line in (run / f"lm_eval-{phase}.jsonl").read_text().splitlines()]
        answers = [record for record in records if record["task"] == "sums_answer"]
        assert [record["document"] for record in answers] == list(range(len(ROWS)))
        assert [record["target"] for record in answers] == [answer for _, answer in ROWS]
        mean = sum(record["exact_match"] for record in answers) / len(ROWS)
        assert mean == pytest.approx(result_of(run)[phase]["lm_eval/sums_answer/exact_match/strict"])
        for record in answers:
            assert record["exact_match"] == (record["answers"] == [record["target"]])


def test_the_numbers_are_those_of_lm_eval_on_the_saved_model(distilled, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    run, _ = distilled
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run / "final_model"), "dtype": "float32"},
        tasks=[str(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    after = result_of(run)["after"]
    assert after["lm_eval/sums_choice/acc"] == theirs["sums_choice"]["acc,none"]
    assert after["lm_eval/sums_answer/exact_match/strict"] == theirs["sums_answer"]["exact_match,strict"]


def test_mode_eval_measures_a_final_model_as_its_run_did(tmp_path, distilled, rows, expert, tasks):
    run, _ = distilled
    words = file_run(tmp_path / "run", rows, run / "final_model", expert, "method.lmbda=0", *QUICK, asked(*tasks))
    answer = call(*words, "mode=eval")
    assert answer.code == 0, answer.stderr
    result = result_of(tmp_path / "run")
    assert result.keys() == {"evaluation", "student_parameters", "seconds"}
    assert result["evaluation"] == pytest.approx(result_of(run)["after"], rel=1e-6)
    assert "lm_eval/sums_choice/acc" in result["evaluation"]
    assert "value" in answer.stdout and "before" not in answer.stdout and "difference" not in answer.stdout
    report = (tmp_path / "run" / "report.md").read_text()
    assert "**evaluation only, finished**" in report and "| metric | better is | value |" in report
    for absent in ("## Curves", "## Rollouts", "before", "After"):
        assert absent not in report.split("## Configuration")[0]
    assert (tmp_path / "run" / "lm_eval-evaluation.jsonl").is_file()
    assert not (tmp_path / "run" / "final_model").exists()


@pytest.mark.slow
def test_a_lora_student_is_asked_with_its_adapter(tmp_path, rows, student, expert, tasks):
    train = ("train.max_steps=60", "train.learning_rate=0.05", "method.lmbda=0")
    words = file_run(tmp_path / "run", rows, student, expert, *train, *QUICK, LORA, asked(*tasks))
    assert call(*words).code == 0
    merged = file_run(tmp_path / "eval", rows, tmp_path / "run" / "final_model", None, "method=sft", *QUICK)
    assert call(*merged, "mode=eval", asked(*tasks)).code == 0
    before, after = result_of(tmp_path / "run")["before"], result_of(tmp_path / "run")["after"]
    found = result_of(tmp_path / "eval")["evaluation"]
    assert {k: v for k, v in after.items() if "lm_eval" in k} == {k: v for k, v in found.items() if "lm_eval" in k}
    documents = [(tmp_path / "run" / f"lm_eval-{phase}.jsonl").read_text() for phase in ("before", "after")]
    assert documents[0] != documents[1] and before.keys() == after.keys()


@pytest.mark.slow
def test_tasks_do_not_disturb_the_training(tmp_path, rows, student, teacher, tasks):
    """To the bit; with dropout, which draws from the global generator, and few-shot examples, which are drawn."""
    lora = LORA.replace("dropout:0.0", "dropout:0.2")
    words = ["method.lmbda=0.5", "train.max_steps=3", lora, "train.learning_rate=0.05", UNCHECKED]
    plain = file_run(tmp_path / "plain", rows, student, teacher, *words)
    assert call(*plain).code == 0
    asking = file_run(tmp_path / "asking", rows, student, teacher, *words, asked(*tasks))
    assert call(*asking, "evaluation.lm_eval.num_fewshot=1").code == 0
    assert train_losses(tmp_path / "asking") == train_losses(tmp_path / "plain")
    assert fingerprint(tmp_path / "asking") == fingerprint(tmp_path / "plain")


def test_few_shot_examples_are_the_same_before_and_after(tmp_path, rows, student, tasks):
    words = ["method=sft", "train.max_steps=1", "train.learning_rate=1e-30", asked(tasks[0]), *QUICK]
    answer = call(*file_run(tmp_path / "run", rows, student, None, *words, "evaluation.lm_eval.num_fewshot=2"))
    assert answer.code == 0, answer.stderr
    before, after = ((tmp_path / "run" / f"lm_eval-{phase}.jsonl").read_text() for phase in ("before", "after"))
    assert before == after


def test_a_limit_and_a_student_without_a_template(tmp_path, rows, tasks):
    bare = build_model(tmp_path / "bare", tokenizer=build_tokenizer(template=False))
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in ROWS))
    words = file_run(tmp_path / "run", text, bare, None, "method=sft", *QUICK, asked(tasks[0]))
    answer = call(*words, "evaluation.lm_eval.limit=3", "mode=eval")
    assert answer.code == 0, answer.stderr
    assert len((tmp_path / "run" / "lm_eval-evaluation.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_two_processes_share_the_documents_and_find_what_one_finds(tmp_path, distilled, rows, expert, tasks):
    run, _ = distilled
    for name, hardware in (("one", "cpu_tiny"), ("two", "cpu_2rank")):
        words = file_run(tmp_path / name, rows, run / "final_model", expert, "method.lmbda=0", *QUICK, asked(*tasks))
        answer = shell(*words, "mode=eval", f"hardware={hardware}")
        assert answer.code == 0, answer.stderr
    one, two = (result_of(tmp_path / name)["evaluation"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)
    documents = [
        [{**json.loads(line), "answers": None} for line in (tmp_path / name / "lm_eval-evaluation.jsonl").open()]
        for name in ("one", "two")
    ]
    assert documents[0] == documents[1]


@pytest.fixture
def weightless(tmp_path, student):
    """The student's folder without its weights: whoever reads them fails with another line."""
    import shutil

    folder = Path(shutil.copytree(student, tmp_path / "weightless"))
    (folder / "model.safetensors").unlink()
    return folder


def refusal(tmp_path, rows, student, *words) -> str:
    answer = call(*file_run(tmp_path / "run", rows, student, None, "method=sft", *words))
    assert answer.code == 2 and "Traceback" not in answer.stderr
    assert not (tmp_path / "run").exists()
    (line,) = [line for line in answer.lines if line.startswith("opd: ")]
    return line


def test_a_task_that_cannot_be_put_is_refused_before_a_weight_is_loaded(tmp_path, rows, weightless, tasks):
    key = "evaluation.lm_eval.tasks"
    cases = {
        str(tmp_path / "none.yaml"): "no such file",
        str(write_task(tmp_path, "task: t\noutput_type: [\n", "broken")): "mend the file",
        str(
            write_task(tmp_path, CHOICE.replace("acc,", "accuracy_of_sorts,"), "metric")
        ): "no metric accuracy_of_sorts",
        str(write_task(tmp_path, CHOICE.replace("wrong]", "nowhere.at.all]"), "column")): "'nowhere' is undefined",
    }
    for file, told in cases.items():
        line = refusal(tmp_path, rows, weightless, asked(file))
        assert line.startswith(f"opd: {key}=") and told in line, line
    line = refusal(tmp_path, rows, weightless, asked(tasks[0]), "evaluation.lm_eval.num_fewshot=50")
    assert line.startswith(f"opd: {key}=sums_choice: no prompt comes of its first document")
    (tmp_path / "documents.jsonl").unlink()
    line = refusal(tmp_path, rows, weightless, asked(tmp_path / "metric.yaml"))
    assert "documents.jsonl" in line and "mend the file" in line
    copy = tmp_path / "copy.yaml"
    copy.write_text(tasks[0].read_text())
    assert "sums_choice is in it twice; name it once" in refusal(tmp_path, rows, weightless, asked(tasks[0], copy))
    assert "model.safetensors" in refusal(tmp_path, rows, weightless, asked(*tasks))  # what is right gets that far


@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know_is_refused_with_the_nearest(tmp_path, rows, weightless):
    line = refusal(tmp_path, rows, weightless, asked("gsm8kk"))
    assert "evaluation.lm_eval.tasks=gsm8kk: lm-eval has no such task; did you mean gsm8k" in line
    line = refusal(tmp_path, rows, weightless, asked("gsm8k"))
    assert "evaluation.lm_eval.tasks=gsm8k: cannot be loaded" in line and "while online" in line


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path, rows, student, tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refusal(tmp_path, rows, student, asked(tasks[0]))
    assert line.endswith("needs lm-eval, not installed here; pip install 'opd[eval]'")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = refusal(tmp_path, rows, student, "tracking=tensorboard")
    assert line.endswith("needs tensorboard, not installed here; pip install 'opd[tensorboard]'")


def test_more_processes_than_documents_are_refused(tmp_path, rows, student, tasks, monkeypatch):
    from opd.conditions import validated
    from opd.errors import ConfigError
    from opd.lm_tasks import LmTasks

    config = validated(_composed(file_run(tmp_path / "run", rows, student, None, "method=sft", asked(tasks[0]))))
    limited = config.evaluation.lm_eval.model_copy(update={"limit": 1})
    evaluation = config.evaluation.model_copy(update={"lm_eval": limited})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"evaluation\.lm_eval\.limit=1: 2 processes share the 20 documents"):
        LmTasks(config.model_copy(update={"evaluation": evaluation}), build_tokenizer())


def test_the_datas_system_prompt_opens_every_prompt(tmp_path, rows, student, tasks):
    from transformers import AutoModelForCausalLM

    from opd.conditions import validated
    from opd.lm_tasks import LmTasks

    more = ("method=sft", "data.system_prompt=Be brief.", "evaluation.lm_eval.limit=2", asked(tasks[1]))
    config, tokenizer = validated(_composed(file_run(tmp_path, rows, student, None, *more))), build_tokenizer()
    lm_tasks = LmTasks(config, tokenizer)
    (task,) = lm_tasks._loaded["tasks"].values()
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    prompts = [f"{system}<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q, _ in ROWS[:2]]
    assert [request.args[0] for request in task.instances] == prompts[:1]
    lm_tasks(AutoModelForCausalLM.from_pretrained(student))
    assert [request.args[0] for request in task.instances] == prompts


def _composed(words: list[str]) -> dict:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=words), resolve=True)
