"""Methods on rows and model folders of one's own, by the command: what is measured, continued, merged and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from e2e.command import call
from e2e.model_folders import CHATML, ROWS, build_model, build_tokenizer, file_run, write_rows
from e2e.pair_rows import LORA, pair_run, read_metrics, write_pairs
from e2e.test_files import check_logits, check_run

DPO_METRICS = {
    "loss",
    "accuracy",
    "reward_margin",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logps",
    "rejected_logps",
}
NO_PREFERENCE = pytest.approx(0.6931472, abs=1e-6)  # log 2: what the pair loss is where nothing has been learnt


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def run(folder, words):
    answer = call(*words)
    assert answer.code == 0, answer.stderr
    return folder


@pytest.fixture
def dpo(tmp_path, pairs, student):
    """Runs dpo in a new folder, on the student or on a model of another folder."""

    def dpo(name, *more, model=student):
        return run(tmp_path / name, pair_run(tmp_path / name, pairs, model, None, "method=dpo", *more))

    return dpo


def pair_logprobs(folder, pairs_file):
    """The mean of Σ log π of chosen and of rejected answers, by transformers' own loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    sums = {"chosen": [], "rejected": []}
    for row in map(json.loads, pairs_file.read_text().splitlines()):
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for kind, found in sums.items():
            ids = tokenizer(row[kind] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt_ids) + ids])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([prompt_ids + ids]), labels=labels).loss
            found.append(-float(mean) * len(ids))
    return {kind: sum(found) / len(found) for kind, found in sums.items()}


def test_dpo_reports_the_names_of_the_guide_while_it_trains_and_on_held_out_pairs(tmp_path, pairs, student, dpo):
    words = ("train.eval_every_steps=1", "train.learning_rate=0.003", "train.batch_size=16", "train.max_steps=3")
    folder = dpo("run", *words, "data.eval_prompts=4")
    check_run(folder, steps=3)
    records = read_metrics(folder)
    trained = [record for record in records if "train/loss" in record]
    evaluated = [record for record in records if "eval/loss" in record]
    assert [record["step"] for record in trained] == [1, 2, 3]
    assert [record["step"] for record in evaluated] == [0, 1, 2, 3]
    for prefix, found in (("train/", trained), ("eval/", evaluated)):
        for record in found:
            assert {prefix + name for name in DPO_METRICS} <= record.keys()
            margin = record[prefix + "chosen_rewards"] - record[prefix + "rejected_rewards"]
            assert record[prefix + "reward_margin"] == pytest.approx(margin, abs=1e-5)
        first, last = found[0], found[-1]
        assert first[prefix + "loss"] == NO_PREFERENCE
        assert first[prefix + "accuracy"] == first[prefix + "reward_margin"] == 0
        assert last[prefix + "loss"] < first[prefix + "loss"]
        assert last[prefix + "accuracy"] > 0.5
    # A batch of all training pairs: the first step's log-probabilities are those of the model that was brought.
    whole = pair_logprobs(student, pairs)
    for kind, value in whole.items():
        seen = (16 * trained[0][f"train/{kind}_logps"] + 4 * evaluated[0][f"eval/{kind}_logps"]) / 20
        assert seen == pytest.approx(value, rel=1e-4)
    after = pair_logprobs(folder / "final_model", pairs)
    assert after["chosen"] - after["rejected"] > whole["chosen"] - whole["rejected"]
    assert "train" in (folder / "training.log").read_text()


def test_the_sanity_check_takes_a_hundred_rows_and_says_so(tmp_path, student):
    many = write_pairs(tmp_path / "many.jsonl", 120)
    words = pair_run(tmp_path / "run", many, student, None, "method=dpo", "method.sanity_check=true")
    run(tmp_path / "run", words)
    data = json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]
    assert data["first_rows_only"] == 100
    log = (tmp_path / "run" / "training.log").read_text()
    assert "first_rows_only 100" in log
    assert "100 train" in log


@pytest.mark.parametrize("lora", [pytest.param((), marks=pytest.mark.slow), (LORA,)])
def test_training_goes_on_from_a_checkpoint_named_as_the_model(tmp_path, pairs, dpo, lora):
    words = ("train.save_every_steps=1", "train.learning_rate=0.02", *lora)
    first = dpo("first", *words)
    second = dpo("second", *words[:2], model=first / "checkpoint-2")
    start, end = read_metrics(second)[0], read_metrics(first)[-1]
    for name in ("eval/nll", "eval/chosen_logps", "eval/rejected_logps"):
        assert start[name] == pytest.approx(end[name], rel=1e-5)
    # The reference is where this training starts, adapter included.
    assert start["eval/loss"] == NO_PREFERENCE
    assert abs(end["eval/reward_margin"]) > 1e-3
    assert read_metrics(second)[-1]["eval/reward_margin"] != 0
    check_run(second)
    if lora:
        assert_adapter(second / "final_adapter", rank=4)
        for name, value in weights(second / "final_adapter").items():
            assert value.shape == weights(first / "final_adapter")[name].shape
            assert not torch.equal(value, weights(first / "final_adapter")[name])


def weights(adapter):
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def assert_adapter(folder, *, rank):
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank


def test_an_adapter_goes_on_with_its_own_settings_and_others_are_refused(tmp_path, pairs, dpo):
    adapter = dpo("first", LORA) / "final_adapter"
    assert_adapter(dpo("same", LORA, model=adapter) / "final_adapter", rank=4)
    other = LORA.replace("r:4", "r:8")
    answer = call(*pair_run(tmp_path / "other", pairs, adapter, None, "method=dpo", other))
    assert answer.code == 2
    told = f"opd: model.student.lora.r=8: training continues the adapter in model.student.path={adapter}, which has 4; "
    assert answer.lines == [told + "set model.student.lora to null"]


@pytest.mark.parametrize(
    "lora", [pytest.param(LORA, marks=pytest.mark.slow), LORA.replace("dropout:0.0", "dropout:0.5")]
)
def test_the_reference_of_an_adapter_is_the_model_without_it_until_the_end(dpo, lora, student, pairs):
    folder = dpo("run", lora, "train.learning_rate=0.05", "method.beta=1.0")
    end, before = read_metrics(folder)[-1], read_metrics(folder)[0]
    for kind in ("chosen", "rejected"):
        gained = end[f"eval/{kind}_logps"] - before[f"eval/{kind}_logps"]
        assert end[f"eval/{kind}_rewards"] == pytest.approx(gained, rel=1e-3, abs=1e-3)
    assert abs(end["eval/reward_margin"]) > 0.01
    # final_model is the merged model: it says what the evaluated student said.
    measured = dpo("again", "mode=eval", model=folder / "final_model")
    measured = read_metrics(measured)[0]
    assert measured["eval/nll"] == pytest.approx(end["eval/nll"], rel=1e-4)
    assert "eval/reward_margin" not in measured  # it would be its own reference


def test_an_adapters_dropout_is_on_in_training_whether_it_is_new_or_goes_on(dpo):
    """With a reference that has none, a margin shows before anything is learnt."""
    lora = LORA.replace("dropout:0.0", "dropout:0.5")
    first = dpo("first", lora, "train.learning_rate=0.05")
    goes_on = read_metrics(dpo("second", "train.learning_rate=0.05", model=first / "final_adapter"))
    assert goes_on[0]["eval/reward_margin"] == 0
    assert goes_on[1]["train/reward_margin"] != 0


def test_the_stop_tokens_of_an_adapters_base_end_its_answers(tmp_path, student):
    from transformers import AutoTokenizer

    from opd.config import Student
    from opd.tokenizers import stop_ids

    base = Path(shutil.copytree(student, tmp_path / "base"))
    settings = json.loads((base / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(base)
    both = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": sorted(both)}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    model = Student(path=str(adapter), dtype="auto", attention="sdpa", trust_remote_code=False)
    assert stop_ids(tokenizer, str(base), model) == stop_ids(tokenizer, str(adapter), model) == both


@pytest.mark.slow
def test_an_adapter_folder_as_teacher_is_the_merged_model(tmp_path, rows, student, dpo):
    trained = dpo("first", LORA, "train.learning_rate=0.1", "train.save_every_steps=2")
    ends = []
    for teacher in (trained / "checkpoint-2", trained / "final_adapter", trained / "final_model"):
        folder = tmp_path / f"by-{teacher.name}"
        run(folder, file_run(folder, rows, student, teacher, "method=gkd", "method.lmbda=0"))
        ends.append(read_metrics(folder)[0]["eval/forward_kl"])
    assert ends[0] > 1e-4  # the teacher is not the student
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-3)


@pytest.fixture(scope="module")
def privileged_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("opsd") / "opsd.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": question}],
            "privileged_messages": [
                {"role": "assistant", "content": "A draft."},
                {"role": "user", "content": f"Wrong. Right is: {answer}"},
            ],
        }
        for question, answer in ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("method.teacher_mode=initial", LORA), marks=pytest.mark.slow),
        pytest.param(("method.teacher_mode=ema", "train.save_every_steps=1"), marks=pytest.mark.slow),
        ("method.teacher_mode=ema", "train.save_every_steps=1", LORA),
    ],
)
def test_opsd_learns_from_rows_with_privileged_messages(tmp_path, privileged_rows, student, more):
    words = file_run(tmp_path / "run", privileged_rows, student, None, "method=opsd", *more, "train.warmup_steps=0")
    folder = run(tmp_path / "run", words)
    check_run(folder)
    for record in read_metrics(folder)[1:3]:
        assert record["train/forward_kl"] > 0  # the same model, and what it reads differs
        assert record["rollout/on_policy"] == 1
    averaged = "method.teacher_mode=ema" in more
    assert (folder / "checkpoint-1" / "ema.pt").is_file() == averaged
    if averaged:
        kept = torch.load(folder / "checkpoint-1" / "ema.pt", weights_only=True)
        assert all("lora_" in name for name in kept) == (LORA in more)


_DROPOUT = (LORA.replace("dropout:0.0", "dropout:0.5"),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("dpo", ()),
        ("opsd-ema", _DROPOUT),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("dpo", _DROPOUT), ("opsd-ema", ()), ("opsd-initial", ()), ("opsd-initial", _DROPOUT))
        ),
    ],
)
def test_a_resumed_run_has_the_teacher_that_the_whole_run_had(tmp_path, pairs, privileged_rows, student, method, lora):
    """The reference is the student before training, not of the checkpoint; the average is that of the checkpoint."""
    words = ("train.max_steps=4", "train.save_every_steps=2", "train.learning_rate=0.02", *lora)
    if method == "dpo":
        rows, words = pairs, ("method=dpo", *words)
    else:
        mode = method.removeprefix("opsd-")
        rows, words = privileged_rows, ("method=opsd", f"method.teacher_mode={mode}", "method.ema_decay=0.5", *words)
    whole = run(tmp_path / "whole", pair_run(tmp_path / "whole", rows, student, None, *words))
    resume = f"run.resume={whole / 'checkpoint-2'}"
    resumed = run(tmp_path / "resumed", pair_run(tmp_path / "resumed", rows, student, None, *words, resume))
    wanted = [record for record in read_metrics(whole) if record["step"] > 2]
    assert [record for record in read_metrics(resumed) if record["step"] > 2] == wanted
    assert [record["step"] for record in wanted if "train/loss" in record] == [3, 4]


def test_opsd_rows_of_other_names_are_read_by_data_columns(tmp_path, student):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "hint": a}) + "\n" for q, a in ROWS))
    columns = ("data.columns.prompt=question", "data.columns.privileged=hint")
    words = file_run(tmp_path / "run", rows, student, None, "method=opsd", *columns)
    assert read_metrics(run(tmp_path / "run", words))[1]["train/forward_kl"] > 0
    answer = call(*file_run(tmp_path / "bad", rows, student, None, "method=opsd", *columns[:1]))
    assert answer.code == 2
    assert "no column privileged_messages or privileged; columns found: question, hint" in answer.stderr


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A teacher of another vocabulary, with a chat template of its own."""
    tokenizer = build_tokenizer(reverse=True)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "[")
    return build_model(tmp_path_factory.mktemp("stranger") / "model", "llama", width=300, seed=3, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("method.hybrid=true", "method.lmbda=0"), marks=pytest.mark.slow),
        pytest.param(("method.extended=false",), marks=pytest.mark.slow),
    ],
)
def test_gold_learns_from_a_teacher_with_another_tokenizer_and_template(tmp_path, rows, student, stranger, more):
    words = file_run(tmp_path / "run", rows, student, stranger, "method=gold", *more, "train.warmup_steps=0")
    folder = run(tmp_path / "run", words)
    check_run(folder)
    record = read_metrics(folder)[1]
    assert record["train/loss"] > 0
    assert record["train/aligned_groups"] > 0
    assert "tokens of student and teacher: text: " in (folder / "training.log").read_text() or (
        "method.extended=false" in more
    )


def test_golds_teacher_reads_the_prompt_in_its_own_template(tmp_path, rows, student, stranger):
    from transformers import AutoTokenizer

    from e2e.test_precompute import load

    loaded = load(*file_run(tmp_path / "run", rows, student, stranger, "method=gold"))
    example, theirs = loaded.texts.data.train[0], AutoTokenizer.from_pretrained(stranger)
    question = example.fields["messages"][:1]
    shown = theirs.decode(example.teacher_prompts["teacher"])
    assert shown == theirs.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert shown.startswith("[user") and "<|im_start|>" not in shown


@pytest.mark.parametrize("method", ["gkd", "minillm", "reverse_kl"])
def test_methods_of_one_tokenizer_refuse_it_before_a_weight_is_loaded(tmp_path, rows, student, stranger, method):
    weightless = Path(shutil.copytree(stranger, tmp_path / "weightless"))
    (weightless / "model.safetensors").unlink()
    answer = call(*file_run(tmp_path / "run", rows, student, weightless, f"method={method}"))
    assert answer.code == 2
    assert answer.stderr.startswith(f"opd: model.teacher.path={weightless}: its tokenizer is not the student's")
    assert "method=gold" in answer.stderr


@pytest.mark.slow
def test_minillm_in_paper_mode_also_learns_the_rows_own_completions(tmp_path, rows, student, teacher):
    words = ("method=minillm", "method.mode=paper", "method.lm_coef=1.0", "train.micro_batch_size=4")
    folder = run(tmp_path / "run", file_run(tmp_path / "run", rows, student, teacher, *words, "train.warmup_steps=0"))
    check_run(folder)
    record = read_metrics(folder)[1]
    assert {"train/loss_lm_data", "train/loss_lm_teacher", "train/loss_pg", "train/loss_single_step"} <= record.keys()
    assert record["rollout/on_policy"] == 0.5
    # Completions that are missing are refused then, and only then.
    prompts = write_rows(tmp_path / "prompts.txt")
    refused = call(*file_run(tmp_path / "refused", prompts, student, teacher, *words))
    assert refused.code == 2
    assert "holds prompts only" in refused.stderr
    without = (*words[:2], "evaluation.greedy=false")
    run(tmp_path / "without", file_run(tmp_path / "without", prompts, student, teacher, *without))


@pytest.mark.parametrize("responses", ["student", "stored"])
def test_adpa_runs_alone_on_folders(tmp_path, pairs, student, teacher, responses):
    other = build_model(tmp_path / "other", seed=2)
    teachers = (f"method.dpo_teacher={teacher}", f"method.ref_teacher={other}", "method.scores=null")
    more = ("model.student.init=null", f"method.responses={responses}", "data.responses=null")
    if responses == "stored":
        stored = run(
            tmp_path / "stored", pair_run(tmp_path / "stored", pairs, student, None, "mode=responses", "method=sft")
        )
        more = (*more[:2], f"data.responses={stored}")
    words = pair_run(tmp_path / "run", pairs, student, None, "method=adpa", *teachers, *more)
    folder = run(tmp_path / "run", words)
    check_run(folder)
    assert not (folder / "stages.json").exists()
    record = read_metrics(folder)[1]
    expected = record["train/loss_chosen_sft"] - 1.6 * record["train/expected_advantage"]
    assert record["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_stored_answers_that_are_cut_are_counted_and_those_of_other_prompts_refused(tmp_path, pairs, student):
    stored = tmp_path / "stored"
    run(stored, pair_run(stored, pairs, student, None, "mode=responses", "method=sft", "rollout.temperature=0"))
    lengths = [
        len(json.loads(line)["completion_ids"]) for line in (stored / "responses.jsonl").read_text().splitlines()
    ]
    words = ("method=adpa", "model.student.init=null", f"data.responses={stored}", "method.adpa_weight=0")
    words += ("method.scores=null", "method.dpo_teacher=null", "data.max_completion_length=5")
    folder = run(tmp_path / "run", pair_run(tmp_path / "run", pairs, student, None, *words))
    data = json.loads((folder / "provenance.json").read_text())["data"]
    assert data["truncated_responses"] == sum(length > 5 for length in lengths) > 0
    assert f"truncated_responses {data['truncated_responses']}" in (folder / "training.log").read_text()
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    words = (*words, f"model.student.chat_template={template}")
    answer = call(*pair_run(tmp_path / "refused", pairs, student, None, *words))
    assert answer.code == 2
    assert answer.stderr.startswith(f"opd: data.responses={stored}: has no answer to the prompt of row ")


def test_the_final_model_of_bf16_training_loads(dpo):
    check_logits(dpo("run", "hardware.precision=bf16") / "final_model")
