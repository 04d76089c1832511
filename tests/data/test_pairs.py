"""Rows of preference data, in the shapes that public data sets have, and what a run is told of bad ones."""

import json
from pathlib import Path

import pytest
import yaml
from small_tokenizers import chatml, llama3, pad_is_eos, plain, plain_with_bos, stop_ids

from opd.data.files import load_examples
from opd.errors import ConfigError
from opd.protocols import Needs, Privileged

PAIRS = Needs(sequences=("chosen", "rejected"))
ALL_TURNS = Needs(turns="all")
ON_POLICY = Needs(completions="unused", rollouts=True)


def say(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = "What is 2 + 2?", "It is 4.", "Who knows?"
USER, CHOSEN, REJECTED = say("user", ASK), say("assistant", GOOD), say("assistant", BAD)
# One pair, as data sets write it.
SHAPES = {
    "strings": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "answers as messages": {"prompt": ASK, "chosen": [CHOSEN], "rejected": [REJECTED]},
    "prompt as messages": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "conversations": {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "dataset": "dpo-mix"},
    "conversations beside a prompt": {"prompt": ASK, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "a string and a message": {"prompt": ASK, "chosen": GOOD, "rejected": [REJECTED]},
    "conversations beside messages": {
        "prompt": ASK,
        "messages": [USER, CHOSEN],
        "chosen": [USER, CHOSEN],
        "rejected": [USER, REJECTED],
        "score_chosen": 8.5,
    },
}


@pytest.fixture
def load(tmp_path):
    def load(*rows, needs=PAIRS, tokenizer=None, **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        tokenizer = tokenizer or chatml()
        options = {"limit": None, "max_prompt_length": None, "max_completion_length": None, **options}
        return load_examples(path, tokenizer, needs=needs, stop_ids=stop_ids(tokenizer), **options)

    return load


@pytest.fixture
def refuse(load, tmp_path):
    def refuse(row, *parts, **options):
        with pytest.raises(ConfigError) as caught:
            load(SHAPES["strings"], row, **options)
        message = str(caught.value)
        assert "\n" not in message
        for part in (f"data.path={tmp_path / 'pairs.jsonl'}, row 2: ", "; ", *parts):
            assert part in message, message

    return refuse


@pytest.mark.parametrize("tokenizer", [chatml, llama3, pad_is_eos, plain, plain_with_bos])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_pair(load, shape, tokenizer):
    tokenizer = tokenizer()
    (example,) = load(SHAPES[shape], tokenizer=tokenizer)
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    else:
        prompt = (tokenizer.bos_token or "") + ASK
    assert tokenizer.decode(example.prompt_ids) == prompt
    # Each answer tokenised behind the same prompt ids, and ended by a stop token.
    assert tokenizer.decode(example.completion_ids) == GOOD + tokenizer.eos_token
    assert tokenizer.decode(example.alternatives["rejected"]) == BAD + tokenizer.eos_token
    assert example.completion_mask is None
    assert example.fields == SHAPES[shape]


def test_a_history_that_both_share_is_prompt_assistant_turns_included(load):
    history = [say("system", "Be brief."), say("user", "Hello"), say("assistant", "Hi"), USER]
    (example,) = load({"chosen": [*history, CHOSEN], "rejected": [*history, REJECTED]})
    tokenizer = chatml()
    assert tokenizer.decode(example.prompt_ids) == tokenizer.apply_chat_template(
        history, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(example.completion_ids) == GOOD + "<|im_end|>"


@pytest.mark.parametrize("shape", sorted(SHAPES.keys() - {"conversations beside messages"}))
def test_a_method_without_pairs_learns_the_chosen_answer(load, shape):
    (pair,) = load(SHAPES[shape])
    for needs in (ALL_TURNS, Needs()):
        (example,) = load(SHAPES[shape], needs=needs)
        assert (example.prompt_ids, example.completion_ids) == (pair.prompt_ids, pair.completion_ids)
        assert example.alternatives == {}


def test_a_method_without_pairs_reads_messages_where_there_are_any(load):
    other = {**SHAPES["strings"], "messages": [USER, say("assistant", "Four.")]}
    (example,) = load(other, needs=ALL_TURNS)
    assert chatml().decode(example.completion_ids) == "Four.<|im_end|>"
    (example,) = load(other)
    assert chatml().decode(example.completion_ids) == GOOD + "<|im_end|>"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_method_that_samples_takes_the_prompts(load, shape):
    (pair,) = load(SHAPES[shape])
    (example,) = load(SHAPES[shape], needs=ON_POLICY)
    assert example.prompt_ids == pair.prompt_ids
    assert example.completion_ids is None


@pytest.mark.parametrize("rejected", [None, "", GOOD, [USER]])
def test_what_a_method_does_not_read_is_no_reason_to_refuse_the_row(load, rejected):
    for needs in (ALL_TURNS, ON_POLICY):
        assert len(load({"prompt": ASK, "chosen": GOOD, "rejected": rejected}, needs=needs)) == 1


def test_both_answers_are_cut_to_the_limit_and_the_row_is_counted_once(load):
    long_rejected = {"prompt": ASK, "chosen": "b", "rejected": "so " * 30}
    long_chosen = {"prompt": ASK, "chosen": "so " * 30, "rejected": "b"}
    whole, cut = load(long_rejected, long_chosen), load(long_rejected, long_chosen, max_completion_length=5)
    assert cut.summary["truncated"] == 2
    assert cut[0].completion_ids == whole[0].completion_ids
    assert cut[0].alternatives["rejected"] == whole[0].alternatives["rejected"][:5]
    assert cut[1].completion_ids == whole[1].completion_ids[:5]
    assert cut[1].alternatives == whole[1].alternatives
    assert load(SHAPES["strings"], max_completion_length=50).summary["truncated"] == 0


def test_pairs_are_duplicates_only_if_both_answers_are(load):
    row = SHAPES["strings"]
    assert load(row, {**row, "rejected": "5?"}).summary["duplicates"] == 0
    assert load(row, row).summary["duplicates"] == 1


def test_renamed_columns_are_read_and_the_files_own_of_these_names_are_not(load):
    row = {"question": ASK, "better": GOOD, "worse": BAD, "chosen": "0", "rejected": "1", "messages": [USER, CHOSEN]}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (example,) = load(row, columns=columns)
    (wanted,) = load(SHAPES["strings"])
    assert (example.prompt_ids, example.completion_ids) == (wanted.prompt_ids, wanted.completion_ids)
    assert example.alternatives == wanted.alternatives


def test_answers_can_be_swapped_by_their_columns(load):
    (example,) = load(SHAPES["strings"], columns={"chosen": "rejected", "rejected": "chosen"})
    assert chatml().decode(example.completion_ids) == BAD + "<|im_end|>"
    assert chatml().decode(example.alternatives["rejected"]) == GOOD + "<|im_end|>"


PRIVILEGED = Privileged("{user}\n\n{privileged}", None, "messages", "template", "error", None)


@pytest.mark.parametrize(
    ("ours", "value", "settings"),
    [
        ("privileged_messages", [say("user", "Hint: 4")], PRIVILEGED),
        ("privileged", "Hint: 4", PRIVILEGED),
        (
            "teacher_messages",
            [say("user", "Hint: 4"), USER],
            Privileged("{user}\n\n{privileged}", None, "full", "template", "error", None),
        ),
    ],
)
def test_privileged_columns_are_renamed_as_the_others_are(load, ours, value, settings):
    needs = Needs(completions="unused", rollouts=True, privileged=settings)
    (own,) = load({"messages": [USER], ours: value}, needs=needs)
    (renamed,) = load({"messages": [USER], "secret": value}, needs=needs, columns={ours: "secret"})
    assert renamed.teacher_prompts == own.teacher_prompts
    assert "Hint: 4" in chatml().decode(own.teacher_prompts["teacher"])
    assert "Hint" not in chatml().decode(own.prompt_ids)


def test_every_column_that_rows_are_read_by_can_be_renamed_in_the_yaml():
    conf = Path(__file__).parents[2] / "conf" / "data" / "file.yaml"
    columns = yaml.safe_load(conf.read_text())["columns"]
    read = {"messages", "prompt", "completion", "chosen", "rejected", "text"}
    assert columns.keys() == read | {"privileged_messages", "privileged", "teacher_messages"}
    assert set(columns.values()) == {None}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, ["chosen and rejected are the same", "remove the row"]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]}, ["chosen and rejected are the same"]),
        ({"prompt": ASK, "chosen": "", "rejected": BAD}, ["chosen must be", "got nothing"]),
        ({"prompt": ASK, "chosen": GOOD, "rejected": None}, ["rejected must be", "got NoneType"]),
        ({"prompt": ASK, "chosen": GOOD, "rejected": {"a": "\n" * 50}}, ["rejected must be", "got dict"]),
        ({"prompt": ASK, "chosen": GOOD, "rejected": " \n"}, ["completion is empty"]),
        ({"prompt": ASK, "chosen": GOOD}, ["no column rejected", "columns found: prompt, chosen", "data.columns.rej"]),
        ({"prompt": ASK, "rejected": BAD, "good": GOOD}, ["no column chosen", "columns found: prompt, rejected, good"]),
        ({"q": ASK, "chosen": GOOD, "rejected": BAD}, ["no column prompt", "columns found: q, chosen, rejected"]),
        ({"chosen": [USER, CHOSEN], "rejected": BAD}, ["one of chosen and rejected is a whole conversation"]),
        ({"chosen": [USER, CHOSEN], "rejected": [say("user", "Else?"), REJECTED]}, ["not begin with the same prompt"]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER]}, ["one of them ends with it"]),
        (
            {"chosen": [USER, CHOSEN, USER, CHOSEN], "rejected": [USER, REJECTED, USER, REJECTED]},
            ["differ before their last message", "cut both"],
        ),
        ({"chosen": [USER, say("user", "a")], "rejected": [USER, REJECTED]}, ["completion ends in a turn of the user"]),
    ],
)
def test_a_bad_pair_is_refused_in_one_line_with_its_row(refuse, row, parts):
    refuse(row, *parts)


def test_a_renamed_column_that_is_not_there_is_refused_with_those_found(load):
    with pytest.raises(ConfigError) as caught:
        load({"prompt": ASK, "better": GOOD, "rejected": BAD}, columns={"chosen": "beter"})
    found = "data.columns.chosen=beter: no such column; columns found: prompt, better, rejected; did you mean better?"
    assert str(caught.value).endswith(f", row 1: {found}")
