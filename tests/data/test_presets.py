"""Every preset reads its sample, which has the columns, folders and splits of the set that it names."""

import pytest
from own_rows import SAMPLES, loaded, refused, rows_of
from pyarrow import parquet
from small_tokenizers import chatml

SFT, PROMPTS, PAIRS = "method=sft", "method=reverse_kl", "method=dpo"
TEACHER = ("model/teacher=path", "model.teacher.path=hub/other")
CHATS = ("tulu3", "capybara", "deita_10k")
# preset -> its sample, kept training rows, evaluation rows
ROWS = {
    "tulu3": ("tulu3", 4, 2),
    "deepmath": ("deepmath", 3, 2),
    "capybara": ("capybara", 4, 1),
    "deita_10k": ("deita_10k", 4, 2),
    "dpo_mix_7k": ("dpo_mix_7k", 4, 2),
}


def folder(name):
    return f"data.path={SAMPLES / ROWS[name][0]}"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", [SFT, "method=gkd", PROMPTS, "method=minillm"])
def test_a_method_that_learns_from_answers_or_samples_its_own_reads_every_set(name, method):
    data = loaded(f"data={name}", folder(name), method, *TEACHER, "data.eval_prompts=2")
    _, num_train, num_eval = ROWS[name]
    assert (len(data.train), len(data.evaluation)) == (num_train, num_eval)
    tokenizer = chatml()
    for row in rows_of(data.train):
        assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(row.completion_ids).endswith("<|im_end|>")


@pytest.mark.parametrize("method", ["dpo", "dckd", "adpa"])
def test_methods_of_pairs_read_the_pairs(method):
    # adpa compares the chosen answer with one of the student's, which a stage before it samples.
    more = {"dpo": (), "dckd": ("method.dpo_teacher=hub/m",), "adpa": ("mode=responses",)}
    data = loaded("data=dpo_mix_7k", folder("dpo_mix_7k"), f"method={method}", "model/teacher=none", *more[method])
    tokenizer, row = chatml(), rows_of(data.train)[-1]
    assert tokenizer.decode(row.completion_ids) == "Yes.<|im_end|>"
    rejected = [tokenizer.decode(ids) for ids in row.alternatives.values()]
    assert rejected == ([] if method == "adpa" else ["No.<|im_end|>"])
    assert "Are you sure?" in tokenizer.decode(row.prompt_ids)
    assert data.summary["kept"] == 4


@pytest.mark.parametrize("name", CHATS)
def test_a_method_of_pairs_refuses_conversations(name):
    refused(f"data={name}", folder(name), PAIRS, "model/teacher=none", parts=["no column chosen", "messages"])


def test_every_assistant_turn_of_a_conversation_is_learnt_by_sft():
    data = loaded("data=deita_10k", folder("deita_10k"), SFT, "model/teacher=none")
    row = data.train[0]
    learnt = [i for i, counted in zip(row.completion_ids, row.completion_mask, strict=True) if counted]
    assert chatml().decode(learnt) == "2 plus 2 is 4.<|im_end|>As said.<|im_end|>"


def test_deepmath_is_read_by_its_question_and_its_first_solution():
    data = loaded("data=deepmath", folder("deepmath"), SFT, "model/teacher=none", "data.eval_prompts=0")
    text = chatml().decode(data.train[0].prompt_ids + data.train[0].completion_ids)
    assert "sum of the first 2 odd numbers" in text and "Solution 1:" in text and "Solution 2:" not in text
    other = ("data.columns.completion=final_answer", "data.eval_prompts=0")
    data = loaded("data=deepmath", folder("deepmath"), SFT, "model/teacher=none", *other)
    assert chatml().decode(data.train[0].completion_ids) == "4<|im_end|>"


def test_a_prompt_that_is_trained_on_is_left_out_of_the_evaluation_split_and_counted():
    data = loaded("data=capybara", folder("capybara"), SFT, "model/teacher=none")
    assert data.summary["evaluation_in_train"] == 1  # "What is 2 plus 2?" stands in both splits
    assert "6 plus 6" in chatml().decode(data.evaluation[0].completion_ids)


def test_a_file_of_prompts_is_read_a_line_a_prompt():
    words = ("data=prompts_file", f"data.path={SAMPLES / 'prompts.txt'}", "data.eval_prompts=1", *TEACHER)
    data = loaded(*words, PROMPTS)
    assert len(data.train) == 4 and data.train[0].completion_ids is None
    refused(*words, SFT, parts=["data.path=", "a .txt file holds prompts only"])


def test_opsd_reads_its_rows_with_what_only_the_teacher_sees():
    words = ("data=opsd", f"data.path={SAMPLES / 'opsd_combined_messages.jsonl'}", "method=opsd", "model/teacher=none")
    data = loaded(*words)
    row, tokenizer = data.train[0], chatml()
    assert "checker" not in tokenizer.decode(row.prompt_ids)
    assert "checker" in tokenizer.decode(row.teacher_prompts["teacher"])
    assert data.summary["empty_privileged"] == 0


@pytest.mark.parametrize("name", CHATS)
def test_the_same_rows_stream(name):
    words = (f"data={name}", folder(name), SFT, "model/teacher=none", "data.eval_prompts=0")
    whole = {tuple(row.prompt_ids + row.completion_ids) for row in rows_of(loaded(*words).train)}
    streamed = loaded(*words, "data.streaming=true", f"train.max_steps={len(whole)}").train
    assert {tuple(row.prompt_ids + row.completion_ids) for row in rows_of(streamed)} == whole


@pytest.mark.parametrize("name", ["tulu3", "deepmath", "capybara", "deita_10k", "dpo_mix_7k"])
def test_the_shipped_files_hold_the_rows_that_are_written_down(name):
    import sys

    sys.path.insert(0, str(SAMPLES))
    import make

    schema, splits = make.SETS[name]
    for split, rows in splits.items():
        table = parquet.read_table(SAMPLES / name / "data" / f"{split}-00000-of-00001.parquet")
        assert table.schema.names == schema.names
        assert table.to_pylist() == rows
