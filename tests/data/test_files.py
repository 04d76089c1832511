import json
import sys
from subprocess import run

import pytest
from small_tokenizers import THINKING, chatml, plain, plain_with_bos, stop_ids

from opd.data.files import FileExamples, load_examples, split_evaluation
from opd.errors import ConfigError
from opd.protocols import Example, Needs

SFT = Needs(turns="all")
ON_POLICY = Needs(completions="unused")
MIXED = Needs(completions="optional")
ROWS = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}.", "n": n} for n in range(5)]


@pytest.fixture
def load(tmp_path):
    def load(rows, *, needs=MIXED, tokenizer=None, **options):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        tokenizer = tokenizer or chatml()
        options = {"limit": None, "max_prompt_length": None, "max_completion_length": None, **options}
        return load_examples(path, tokenizer, needs=needs, stop_ids=stop_ids(tokenizer), **options)

    return load


@pytest.fixture
def refuse(load, tmp_path):
    def refuse(rows, *parts, **options):
        with pytest.raises(ConfigError) as caught:
            load(rows, **options)
        message = str(caught.value)
        assert "\n" not in message
        for part in (f"data.path={tmp_path / 'train.jsonl'}", "; ", *parts):
            assert part in message, message

    return refuse


def test_every_row_becomes_an_example_with_its_number_and_columns(load):
    examples = load(ROWS)
    assert [example.row for example in examples] == [1, 2, 3, 4, 5]
    assert [example.fields for example in examples] == ROWS
    assert chatml().decode(examples[3].completion_ids) == "It is 6.<|im_end|>"
    assert examples.summary == {
        "rows": 5,
        "kept": 5,
        "dropped": {},
        "truncated": 0,
        "duplicates": 0,
        "blank_lines": 0,
    }


def test_the_limit_keeps_the_first_rows(load):
    assert [example.fields["n"] for example in load(ROWS, limit=2)] == [0, 1]


def test_a_prompt_that_is_too_long_drops_its_row_and_keeps_the_numbers_of_the_others(load):
    longest = max(len(example.prompt_ids) for example in load(ROWS))
    rows = [ROWS[0], {"prompt": "long " * 50, "completion": "x"}, ROWS[1]]
    examples = load(rows, max_prompt_length=longest)
    assert [example.row for example in examples] == [1, 3]
    assert examples.summary["dropped"] == {"prompt_too_long": 1}
    assert (examples.summary["rows"], examples.summary["kept"]) == (3, 2)


def test_a_completion_that_is_too_long_loses_its_end_and_its_stop_token(load):
    whole = load([{"prompt": "a", "completion": "b " * 20}, ROWS[0]])
    examples = load([{"prompt": "a", "completion": "b " * 20}, ROWS[0]], max_completion_length=12)
    assert examples[0].completion_ids == whole[0].completion_ids[:12]
    assert examples[0].completion_ids[-1] not in stop_ids(chatml())
    assert examples[1] == whole[1]
    assert examples.summary["truncated"] == 1
    exact = len(whole[0].completion_ids)
    assert load(ROWS[:1], max_completion_length=exact).summary["truncated"] == 0


def test_a_cut_completion_keeps_a_mask_of_its_length(load):
    turns = ["Hello", "Hi", "And you?", "Fine"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    whole = load([{"messages": messages}], needs=SFT)[0]
    cut = load([{"messages": messages}], needs=SFT, max_completion_length=7)[0]
    assert (cut.completion_ids, cut.completion_mask) == (whole.completion_ids[:7], whole.completion_mask[:7])


def test_a_row_without_a_predicted_loss_token_is_dropped(load):
    tokenizer = plain_with_bos()
    rows = [{"text": "Hello there"}, {"prompt": "a", "completion": "b"}]
    examples = load(rows, needs=SFT, tokenizer=tokenizer, max_completion_length=1)
    assert [example.row for example in examples] == [2]
    assert examples.summary["dropped"] == {"no_loss_token": 1}
    assert examples.summary["truncated"] == 1
    examples = load(rows, needs=SFT, tokenizer=plain(), max_completion_length=1)
    assert [example.row for example in examples] == [2]


def test_duplicates_are_kept_and_counted(load):
    examples = load([ROWS[0], ROWS[1], ROWS[0], {**ROWS[0], "completion": "other"}, ROWS[0]])
    assert len(examples) == 5
    assert examples.summary["duplicates"] == 2


def test_blank_lines_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    examples = load_examples(
        tmp_path / "a.txt",
        plain(),
        needs=ON_POLICY,
        stop_ids=stop_ids(plain()),
        limit=None,
        max_prompt_length=None,
        max_completion_length=None,
        columns=None,
    )
    assert [plain().decode(example.prompt_ids) for example in examples] == ["one", "two"]
    assert examples.summary["blank_lines"] == 1


def test_nothing_kept_is_refused_with_the_reasons_and_limits(refuse):
    refuse(ROWS, "none of 5 rows", "prompt_too_long 5", "data.max_prompt_length=3", max_prompt_length=3)


def test_a_missing_completion_is_refused_where_the_method_needs_one(refuse, load):
    rows = [ROWS[0], {"prompt": "no answer"}]
    refuse(rows, "row 2", "needs a completion", needs=Needs())
    assert load(rows, needs=MIXED)[1].completion_ids is None


def test_an_unused_completion_is_dropped_and_cannot_be_wrong(load):
    examples = load([ROWS[0], {"prompt": "a", "completion": ""}], needs=ON_POLICY)
    assert [example.completion_ids for example in examples] == [None, None]
    assert examples[0].fields == ROWS[0]
    thought = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = chatml(THINKING)
    needs = Needs(turns="all", completions="unused")
    example = load([{"messages": thought[:2]}], needs=needs, tokenizer=tokenizer)[0]
    assert tokenizer.decode(example.prompt_ids).endswith("user\na<|im_end|>\n<|im_start|>assistant\n")
    example = load([{"messages": thought}], needs=ON_POLICY, tokenizer=tokenizer)[0]
    assert tokenizer.decode(example.prompt_ids).endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert example.fields == {"messages": thought}


def test_columns_rename_and_the_old_names_stay_in_the_fields(load):
    rows = [{"question": "Hello", "reply": "Hi", "gold": 3}]
    example = load(rows, columns={"prompt": "question", "completion": "reply", "answer": "gold"})[0]
    assert chatml().decode(example.completion_ids) == "Hi<|im_end|>"
    assert example.fields == {**rows[0], "prompt": "Hello", "completion": "Hi", "answer": 3}


def test_naming_a_prompt_column_hides_the_messages(load):
    rows = [{"question": "Hello", "messages": [{"role": "user", "content": "other"}], "completion": "Hi"}]
    example = load(rows, columns={"prompt": "question"})[0]
    assert "user\nHello<" in chatml().decode(example.prompt_ids)
    assert chatml().decode(example.completion_ids) == "Hi<|im_end|>"
    assert example.fields["messages"] == rows[0]["messages"]


def test_naming_another_column_hides_nothing(load):
    example = load([{"messages": [{"role": "user", "content": "x"}], "gold": 1}], columns={"answer": "gold"})[0]
    assert "user\nx<" in chatml().decode(example.prompt_ids)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(refuse):
    rows = [{"question": "a", "n": 1}, {"n": 2}]
    columns = {"prompt": "qestion"}
    refuse(rows, "row 1", "data.columns.prompt=qestion", "question, n", "did you mean question?", columns=columns)
    refuse(rows, "row 2", "columns found: n", columns={"prompt": "question"})


def test_a_bad_row_is_refused_with_its_line_in_the_file(refuse):
    refuse([ROWS[0], ROWS[1], {"prompt": ""}], "row 3: the prompt is empty")


def test_reading_data_needs_no_torch():
    code = "import sys, opd.data.files; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert run([sys.executable, "-c", code]).returncode == 0


# Splitting


def prompts(examples):
    return {tuple(example.prompt_ids) for example in examples}


def made(prompt_ids, completions=None):
    completions = completions or [[9]] * len(prompt_ids)
    pairs = enumerate(zip(prompt_ids, completions, strict=True), start=1)
    return FileExamples([Example(row, p, c) for row, (p, c) in pairs], {})


def test_a_split_keeps_every_row_once_and_gives_eval_as_many_as_asked():
    examples = made([[n] for n in range(20)])
    train, evaluation = split_evaluation(examples, 6, seed=1)
    assert (len(train), len(evaluation)) == (14, 6)
    assert sorted(e.row for e in [*train, *evaluation]) == list(range(1, 21))
    assert (train.summary["kept"], evaluation.summary["kept"]) == (14, 6)
    for side in (train, evaluation):
        assert [e.row for e in side] == sorted(e.row for e in side)


def test_a_split_is_a_function_of_its_seed():
    examples = made([[n] for n in range(20)])
    rows = [[e.row for e in split_evaluation(examples, 6, seed)[1]] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("seed", range(10))
def test_train_and_eval_never_share_a_prompt(seed):
    examples = made([[n % 7] for n in range(20)], [[n] for n in range(20)])
    train, evaluation = split_evaluation(examples, 6, seed)
    assert not prompts(train) & prompts(evaluation)
    assert len(train) + len(evaluation) == 20
    assert 1 <= len(evaluation) <= 6


def test_running_texts_are_split_as_texts():
    examples = made([[]] * 6, [[1, 2], [1, 2], [3, 4], [5, 6], [7, 8], [9, 9]])
    train, evaluation = split_evaluation(examples, 3, seed=0)
    assert len(evaluation) == 3
    assert not {tuple(e.completion_ids) for e in train} & {tuple(e.completion_ids) for e in evaluation}


@pytest.mark.parametrize(
    ("prompt_ids", "num_eval", "parts"),
    [
        ([[1], [2], [3]], 3, ["only 3 rows", "2 or less"]),
        ([[1], [2]], 0, ["at least 1"]),
        ([[1], [1], [1], [2], [2]], 1, ["rows of one prompt stay together", "raise it to 2"]),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(prompt_ids, num_eval, parts):
    with pytest.raises(ConfigError) as caught:
        split_evaluation(made(prompt_ids), num_eval, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"data.eval_prompts={num_eval}: ", "; ", *parts):
        assert part in message, message


def test_a_split_of_one_prompt_only_is_refused_without_impossible_advice():
    with pytest.raises(ConfigError, match="there is only one"):
        split_evaluation(made([[1]] * 4), 2, seed=0)
