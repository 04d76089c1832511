"""The data's checks: healthy rows pass, and each thing that is wrong with rows is told as that and nothing else."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from contract.variants import PLACEHOLDER, VARIANTS, Variant, compose, run_alone, tiny_config
from data.small_tokenizers import CHATML, build, chatml, plain_with_bos, stop_ids

from opd.conditions import validated
from opd.data import DataSet
from opd.data.files import FileExamples, load_examples, split_evaluation
from opd.data.walk_tokenizer import build_tokenizer
from opd.loading import Texts, load_method, load_readers, load_texts
from opd.preflight.data import check_data
from opd.preflight.pair import check_pair
from opd.tokenizers import Vocabulary

SFT = Variant("sft", "data", ("model/teacher=none",))
OPSD = Variant("opsd", "data")
DPO = Variant("dpo", "data", ("model/teacher=none",))
ON_POLICY = Variant("gkd", "data", ("method.lmbda=1",))
LAST_TURN = Variant("sft", "data", ("model/teacher=none", "method.loss_on=last_assistant"))


def said(role, content):
    return {"role": role, "content": content}


def single(n):
    return {"messages": [said("user", f"What is {n} + 1?"), said("assistant", f"It is {n + 1}.")]}


def two_turns(n):
    return {"messages": [*single(n)["messages"], said("user", f"And {n} + 2?"), said("assistant", f"That is {n + 2}.")]}


def pair(n):
    return {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"No idea, {n} times."}


def hinted(n):
    return {**single(n), "privileged": f"The answer is {n + 1}."}


def loaded(folder, rows, variant=SFT, tokenizer=None, eval_prompts=0, limits=(200, 200), **train):
    """(config, method, texts) of these rows as a run would have them."""
    tokenizer = tokenizer or chatml()
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(file), "max_prompt_length": limits[0], "max_completion_length": limits[1]}
    config = tiny_config(variant, data=data, train={"batch_size": 4, **train})
    method = load_method(config)
    examples = load_examples(
        file,
        tokenizer,
        needs=method.needs,
        stop_ids=stop_ids(tokenizer),
        limit=None,
        max_prompt_length=limits[0],
        max_completion_length=limits[1],
    )
    train, evaluation = examples, []
    if eval_prompts:
        train, held_out = split_evaluation(examples, eval_prompts, 0)
        evaluation = [held_out[number] for number in range(len(held_out))]
    vocabulary = Vocabulary(400, stop_ids(tokenizer), tokenizer.pad_token_id)
    dataset = DataSet(train, evaluation, lambda *_: {}, summary=examples.summary)
    return config, method, Texts(tokenizer, vocabulary, dataset, vocabulary)


def with_rows(run, change):
    """The run with each of its training rows changed."""
    config, method, texts = run
    rows = [change(texts.data.train[number]) for number in range(len(texts.data.train))]
    return config, method, replace(texts, data=replace(texts.data, train=FileExamples(rows, {})))


def heeded(findings):
    assert all("\n" not in finding.line for finding in findings)
    return [(finding.severity, finding.check) for finding in findings if finding.severity != "note"]


def lines(findings, check):
    return [finding.line for finding in findings if finding.check == check]


@pytest.mark.parametrize(
    "variant, row",
    [(SFT, single), (SFT, two_turns), (LAST_TURN, two_turns), (DPO, pair), (OPSD, hinted), (ON_POLICY, single)],
    ids=["turn", "turns", "last_turn", "pairs", "hints", "prompts"],
)
def test_healthy_rows_pass(tmp_path, variant, row):
    findings = check_data(*loaded(tmp_path, [row(n) for n in range(40)], variant, eval_prompts=8))
    assert heeded(findings) == []
    assert "half / 95 % / the longest of 32 rows: prompts" in lines(findings, "data.lengths")[0]
    assert "32 training rows" in lines(findings, "data.steps")[0]


def test_healthy_rows_pass_under_a_system_prompt_without_a_template_and_with_pad_that_is_eos(tmp_path):
    from data.small_tokenizers import pad_is_eos, plain, plain_with_bos

    rows = [two_turns(n) for n in range(20)]
    for tokenizer in (plain(pad_token="<|endoftext|>"), plain_with_bos(), pad_is_eos()):
        assert heeded(check_data(*loaded(tmp_path, rows, tokenizer=tokenizer))) == []


# Counts and lengths


def test_many_dropped_prompts_are_a_warning_with_the_key_and_the_share(tmp_path):
    rows = [single(n) for n in range(30)]
    long = {"messages": [said("user", "x y " * 80), said("assistant", "No.")]}
    few = check_data(*loaded(tmp_path, [*rows, long], limits=(100, 200)))
    assert heeded(few) == [] and "1 of 31" in lines(few, "data.dropped")[0]
    many = check_data(
        *loaded(
            tmp_path,
            [*rows, *({"messages": [said("user", "x y " * (80 + n)), said("assistant", "No.")]} for n in range(9))],
            limits=(100, 200),
        )
    )
    assert heeded(many) == [("warning", "data.dropped")]
    (line,) = lines(many, "data.dropped")
    assert "data.max_prompt_length=100: 9 of 39 rows dropped (prompt_too_long, 23%)" in line


def test_many_cut_answers_are_a_warning_with_the_key_and_the_share(tmp_path):
    rows = [single(n) for n in range(30)]
    long = [{"messages": [said("user", f"Count to {n}"), said("assistant", f"{n} " * 60)]} for n in range(9)]
    findings = check_data(*loaded(tmp_path, rows + long, limits=(200, 50)))
    assert heeded(findings) == [("warning", "data.truncated")]
    assert "data.max_completion_length=50: 9 of 39 answers cut (23%)" in lines(findings, "data.truncated")[0]
    assert "50 tokens (limit 50)" in lines(findings, "data.lengths")[0]


def test_a_training_without_a_step_is_an_error(tmp_path):
    findings = check_data(*loaded(tmp_path, [single(n) for n in range(3)], max_steps=2))
    assert heeded(findings) == [("error", "data.steps")]
    assert "lower it to 3 or less" in lines(findings, "data.steps")[0]


def test_a_warm_up_as_long_as_the_training_is_a_warning(tmp_path):
    rows = [single(n) for n in range(8)]
    for steps, warmup, line in (
        (20, {"warmup_steps": 20}, "train.warmup_steps=20: all 20 steps are warm-up"),
        (20, {"warmup_steps": 19}, ""),
        (1, {"warmup_ratio": 0.1}, "train.warmup_ratio=0.1: all 1 steps are warm-up"),
    ):
        findings = check_data(*loaded(tmp_path, rows, max_steps=steps, **warmup))
        assert heeded(findings) == ([("warning", "data.warmup")] if line else [])
        assert line in " ".join(lines(findings, "data.warmup"))


def test_a_source_of_a_mixture_that_gives_nothing_is_an_error_and_one_that_loses_much_a_warning(tmp_path):
    config, method, texts = loaded(tmp_path, [single(n) for n in range(20)])
    told = {"rows": 20, "kept": 20, "dropped": {}, "used": 10, "left_out": 10}
    sources = {
        "whole": told,
        "half": {**told, "kept": 10, "dropped": {"prompt_too_long": 10}},
        "none": {**told, "used": 0},
    }
    texts.data.summary["sources"] = sources
    findings = check_data(config, method, texts)
    assert [(f.severity, f.what.split(":")[0]) for f in findings if f.check == "data.sources"] == [
        ("note", "data.sources.whole"),
        ("warning", "data.sources.half"),
        ("error", "data.sources.none"),
    ]


def test_many_rows_without_privileged_text_are_a_warning(tmp_path):
    variant = Variant("opsd", "data", ("method.on_empty_privileged=keep",))
    rows = [{**hinted(n), "privileged": "" if n % 2 else f"It is {n}"} for n in range(20)]
    findings = check_data(*loaded(tmp_path, rows, variant))
    assert heeded(findings) == [("warning", "data.privileged")]
    assert "empty_privileged 10 of 20" in lines(findings, "data.privileged")[0]


# Rows that repeat, and rows on both sides


def test_repeated_rows_are_counted_and_many_of_them_a_warning(tmp_path):
    rows = [single(n) for n in range(150)]
    few = check_data(*loaded(tmp_path, [*rows, rows[0]]))
    assert heeded(few) == [] and "1 of 151 rows" in lines(few, "data.duplicates")[0]
    findings = check_data(*loaded(tmp_path, rows + rows[:5]))
    assert heeded(findings) == [("warning", "data.duplicates")]
    assert "5 of 155 rows (3%)" in lines(findings, "data.duplicates")[0]


def test_a_prompt_with_several_answers_is_a_note(tmp_path):
    rows = [single(n) for n in range(10)]
    other = {"messages": [rows[0]["messages"][0], said("assistant", "One more.")]}
    findings = check_data(*loaded(tmp_path, [*rows, other]))
    assert heeded(findings) == []
    assert "1 of 11 rows repeat a prompt with another answer" in lines(findings, "data.prompts")[0]


def test_prompts_on_both_sides_of_the_split_are_an_error(tmp_path):
    config, method, texts = loaded(tmp_path, [single(n) for n in range(20)], eval_prompts=5)
    leaking = replace(texts.data, evaluation=[*texts.data.evaluation, texts.data.train[3], texts.data.train[4]])
    findings = check_data(config, method, replace(texts, data=leaking))
    assert heeded(findings) == [("error", "data.leakage")]
    assert "2 of 7 evaluation prompts are trained on too" in lines(findings, "data.leakage")[0]


def test_leakage_is_looked_up_in_all_rows_and_the_rest_in_two_thousand(tmp_path):
    config, method, texts = loaded(tmp_path, [single(n) for n in range(2500)])
    leaking = replace(texts.data, evaluation=[texts.data.train[1234]])
    findings = check_data(config, method, replace(texts, data=leaking))
    assert heeded(findings) == [("error", "data.leakage")]
    assert "2,000 rows looked at of 2,500" in lines(findings, "data.lengths")[0]


# Answers


def test_empty_answers_are_a_warning(tmp_path):
    run = loaded(tmp_path, [single(n) for n in range(20)])
    findings = check_data(*with_rows(run, lambda row: replace(row, fields={}, completion_ids=row.completion_ids[-1:])))
    assert heeded(findings) == [("warning", "data.empty")]


def test_answers_that_repeat_the_question_are_a_warning(tmp_path):
    rows = [{"messages": [said("user", f"Say {n}"), said("assistant", f"Say {n}")]} for n in range(20)]
    assert heeded(check_data(*loaded(tmp_path, rows))) == [("warning", "data.echo")]


def test_pairs_that_are_cut_to_the_same_tokens_are_a_warning(tmp_path):
    rows = [
        {"prompt": f"Count {n}", "chosen": "one two three four five six", "rejected": "one two three four five seven"}
        for n in range(40)
    ]
    findings = check_data(*loaded(tmp_path, rows, DPO, limits=(200, 4)))
    assert heeded(findings) == [("warning", "data.truncated"), ("warning", "data.pairs")]


def test_answers_whose_end_is_not_learnt_are_an_error(tmp_path):
    run = loaded(tmp_path, [single(n) for n in range(20)])

    def masked(row):  # as a mask of ids that are not pad makes it where pad is eos
        return replace(row, completion_mask=[True] * (len(row.completion_ids) - 1) + [False])

    findings = check_data(*with_rows(run, masked))
    assert heeded(findings) == [("error", "data.end")]
    cut = with_rows(run, lambda row: replace(row, completion_ids=row.completion_ids[:-1]))
    assert heeded(check_data(*cut)) == [("error", "data.end")]


def test_a_rejected_answer_without_an_end_is_an_error(tmp_path):
    run = loaded(tmp_path, [pair(n) for n in range(20)], DPO)
    cut = with_rows(run, lambda row: replace(row, alternatives={"rejected": row.alternatives["rejected"][:-1]}))
    assert heeded(check_data(*cut)) == [("error", "data.end")]


def test_a_mask_that_learns_what_the_user_says_is_an_error(tmp_path):
    run = loaded(tmp_path, [two_turns(n) for n in range(20)])
    assert heeded(check_data(*with_rows(run, lambda row: replace(row, completion_mask=None)))) == [
        ("error", "data.mask")
    ]


WRITES_THINK = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)


@pytest.mark.parametrize(
    ("tokenizer", "asked"),
    [(chatml(), "end"), (chatml(), "e"), (chatml(WRITES_THINK), "think"), (plain_with_bos(), "s")],
    ids=["end", "letter", "think", "no_template"],
)
def test_a_user_turn_that_also_stands_in_the_frame_of_an_answer_passes(tmp_path, tokenizer, asked):
    rows = [{"messages": [*single(n)["messages"], said("user", asked), said("assistant", f"{n}.")]} for n in range(20)]
    assert heeded(check_data(*loaded(tmp_path, rows, tokenizer=tokenizer))) == []


def test_a_mask_that_is_one_place_late_is_an_error(tmp_path):
    run = loaded(tmp_path, [two_turns(n) for n in range(20)])

    def shifted(row):
        return replace(row, completion_mask=[False, *row.completion_mask[:-1]])

    assert ("error", "data.mask") in heeded(check_data(*with_rows(run, shifted)))


# Prompts


def test_a_prompt_without_its_head_is_an_error(tmp_path):
    run = loaded(tmp_path, [single(n) for n in range(20)])
    findings = check_data(*with_rows(run, lambda row: replace(row, prompt_ids=row.prompt_ids[-6:])))
    assert heeded(findings) == [("error", "data.prompt_cut")]
    assert (
        "20 prompts lack their beginning (20 rows rendered again; the first is row 1)"
        in lines(findings, "data.prompt_cut")[0]
    )


def test_a_prompt_that_the_template_does_not_write_is_a_warning(tmp_path):
    run = loaded(tmp_path, [single(n) for n in range(20)])
    findings = check_data(*with_rows(run, lambda row: replace(row, prompt_ids=[5, *row.prompt_ids])))
    assert heeded(findings) == [("warning", "data.prompt")]


def test_a_prompt_that_ends_in_an_assistant_turn_is_a_warning(tmp_path):
    rows = [{"messages": [*single(n)["messages"], said("assistant", "And more.")]} for n in range(20)]
    assert heeded(check_data(*loaded(tmp_path, rows, LAST_TURN))) == [("warning", "data.open_turn")]


def test_a_teachers_prompt_that_lost_the_question_is_an_error(tmp_path):
    run = loaded(tmp_path, [hinted(n) for n in range(20)], OPSD)
    cut = with_rows(run, lambda row: replace(row, teacher_prompts={"teacher": row.teacher_prompts["teacher"][-30:]}))
    assert heeded(check_data(*cut)) == [("error", "data.teacher_prompt")]


def test_columns_that_are_not_learnt_from_are_a_note(tmp_path):
    findings = check_data(*loaded(tmp_path, [{**pair(n), "completion": "x"} for n in range(20)]))
    assert heeded(findings) == []
    assert "rejected" in lines(findings, "data.columns")[0]


# The walk, by every method


@pytest.fixture(scope="module")
def walk_models(tmp_path_factory):
    """Folders of the walk's tokenizers with a model's config, but no weights: {role: path}."""
    from transformers import LlamaConfig

    folders = {}
    for role, size in (("student", 512), ("teacher", 512), ("student_430", 430)):
        folder, tokenizer = tmp_path_factory.mktemp("walk") / role, build_tokenizer(size)
        tokenizer.save_pretrained(folder)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape).save_pretrained(folder)
        folders[role] = str(folder)
    return folders


def needs_its_folders(variant):
    return variant.label == "kept_scores" or variant.label.startswith("fresh")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not needs_its_folders(v)], ids=str)
def test_the_walk_gives_nothing_to_heed(variant, walk_models):
    assert heeded(walk_findings(variant, walk_models, "data.limit=192", "data.eval_prompts=32")[0]) == []


def test_the_whole_walk_is_checked_in_less_than_a_second(walk_models):
    assert walk_findings(Variant("gold", "defaults"), walk_models)[1] < 1


def walk_findings(variant, walk_models, *more):
    """What the checks of this variant find on the walk, and their CPU seconds."""
    words = [word for word in variant.words if PLACEHOLDER not in word]
    data = {"dpo": "walk_bold", "dckd": "walk_bold", "adpa": "walk_bold", "opsd": "walk_hint"}.get(
        variant.method, "walk"
    )
    if variant.method == "adpa":
        words += [f"method.{name}={walk_models['teacher']}" for name in ("dpo_teacher", "ref_teacher")]
        words += ["method.scores=null", "method.responses=student", "data.responses=null"]
    other = variant.method == "gold" and "one_tokenizer" not in variant.label
    words += [f"model/student=path model.student.path={walk_models['student_430' if other else 'student']}"]
    words += [f"model/teacher=path model.teacher.path={walk_models['teacher']}"]
    composed = compose(f"method={variant.method}", f"data={data}", *" ".join(words).split(), *more)
    config = validated(run_alone(composed))
    method = load_method(config)
    readers = load_readers(config, method)
    texts = load_texts(config, method, readers)
    started = time.process_time()
    findings = [*check_pair(config, method, readers), *check_data(config, method, texts)]
    return findings, time.process_time() - started


def test_a_tokenizer_that_normalises_text_does_not_break_the_masks(tmp_path):
    from tokenizers import normalizers

    tokenizer = build(
        CHATML,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    rows = [
        {"messages": [said("user", f"Cafe\u0301 {n}?"), said("assistant", f"Un cafe\u0301, {n}.")]} for n in range(9)
    ]
    assert heeded(check_data(*loaded(tmp_path, rows, tokenizer=tokenizer))) == []


# Rows as the loading brings them


@pytest.fixture
def own(tmp_path, walk_models):
    """check_data of a run on rows of one's own, loaded as a run loads them."""

    def findings(*words):
        model = ["model/student=path", f"model.student.path={walk_models['student']}", "model/teacher=none"]
        steps = ["train.batch_size=4", "train.max_steps=20", "data.eval_prompts=4", "rollout.max_completion_tokens=8"]
        config = validated(run_alone(compose(*model, *steps, "evaluation.divergence=false", *words)))
        method = load_method(config)
        return check_data(config, method, load_texts(config, method))

    return findings


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mixture_of_sources_with_other_columns_passes(tmp_path, own):
    questions = write(
        tmp_path / "a.jsonl", [{"question": f"{n}?", "answer": f"{n}.", "messages": "x"} for n in range(40)]
    )
    chats = write(tmp_path / "b.jsonl", [two_turns(n) for n in range(40)])
    sources = (
        f"a:{{path:{questions},weight:1,columns:{{prompt:question,completion:answer}}}},b:{{path:{chats},weight:1}}"
    )
    findings = own("method=sft", "data=mixture", f"+data.sources={{{sources}}}", "data.system_prompt=Be brief.")
    assert heeded(findings) == []
    assert [line.split(": ")[2] for line in lines(findings, "data.sources")] == ["40 rows used, 0 left over"] * 2


def test_a_stream_passes_though_it_begins_again(tmp_path, own):
    chats = write(tmp_path / "rows.jsonl", [two_turns(n) for n in range(30)])
    words = ["data=file", f"data.path={chats}", "data.streaming=true", "data.shuffle_buffer=8"]
    findings = own("method=sft", *words, "data.system_prompt=Be brief.")
    assert heeded(findings) == []
    assert "80 training rows, 20 steps of 4: streamed" in lines(findings, "data.steps")[0]


def test_whole_conversations_as_chosen_and_rejected_pass(tmp_path, own):
    def conversation(n, answer):
        return [said("user", f"What is {n}?"), said("assistant", answer)]

    rows = [{"chosen": conversation(n, f"It is {n}."), "rejected": conversation(n, "No.")} for n in range(40)]
    words = ["method=dpo", "data=file", f"data.path={write(tmp_path / 'rows.jsonl', rows)}"]
    assert heeded(own(*words, "train.warmup_steps=0")) == []
    assert heeded(own(*words)) == [("warning", "data.warmup")]  # DPO's own is longer than the run's 20 steps
