import json
from dataclasses import replace

import pytest
from rendering import WHERE, rendered, text
from small_tokenizers import THINKING, chatml, llama3, plain, plain_with_bos, stop_ids

from opd.data.files import load_examples
from opd.data.privileged import TeacherPrompt, privileged_prompt
from opd.errors import ConfigError
from opd.protocols import Needs, Privileged

SETTINGS = Privileged(
    template="{user}\n\n{privileged}",
    bridge="Answer again.",
    teacher_prompt="messages",
    layout="template",
    on_empty="error",
    max_length=None,
)
SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
DRAFT, CHECK = {"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "No, count again."}
FIX = {"role": "assistant", "content": "It is 4."}
ROW = {"messages": [SYSTEM, QUESTION, ANSWER], "privileged_messages": [DRAFT, CHECK]}
PLACE = f"{WHERE}, row 7"


def prompt_of(fields, tokenizer=None, **settings):
    tokenizer = tokenizer or chatml()
    student = rendered(fields, tokenizer).prompt_ids
    return privileged_prompt(fields, student, tokenizer, replace(SETTINGS, **settings), PLACE)


def prompt_text(fields, tokenizer=None, **settings):
    tokenizer = tokenizer or chatml()
    return text(tokenizer, prompt_of(fields, tokenizer, **settings).ids)


def chatml_text(*messages, opened=True):
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n" * opened


def refusal(fields, *parts, **settings):
    with pytest.raises(ConfigError) as caught:
        prompt_of(fields, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{PLACE}: ", "; ", *parts):
        assert part in message, message


def num_tokens(value):
    return len(chatml()(value, add_special_tokens=False)["input_ids"])


# What the teacher reads


def test_privileged_messages_stand_between_the_prompt_and_the_header_of_the_answer():
    assert prompt_text(ROW) == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK)


def test_the_completion_of_the_row_is_not_in_the_teachers_prompt():
    answered, unanswered = ROW, {**ROW, "messages": ROW["messages"][:-1]}
    assert prompt_of(answered) == prompt_of(unanswered)


def test_a_bridge_follows_privileged_messages_that_end_with_the_assistant():
    row = {**ROW, "privileged_messages": [DRAFT, CHECK, FIX]}
    bridge = {"role": "user", "content": "Answer again."}
    assert prompt_text(row) == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK, FIX, bridge)
    assert prompt_text(row, bridge=None) == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK, FIX)


@pytest.mark.parametrize("column", ["privileged", "privileged_messages"])
def test_a_string_is_folded_into_the_last_user_message(column):
    row = {"messages": [QUESTION, DRAFT, CHECK, ANSWER], column: "The answer is 4."}
    folded = {"role": "user", "content": "No, count again.\n\nThe answer is 4."}
    assert prompt_text(row) == chatml_text(QUESTION, DRAFT, folded)


def test_braces_in_a_row_are_text_and_not_places_of_the_template():
    row = {"prompt": "What is {privileged}? {x}", "privileged": "{user} {0}"}
    folded = {"role": "user", "content": "Hint: {user} {0}. What is {privileged}? {x}"}
    assert prompt_text(row, template="Hint: {privileged}. {user}") == chatml_text(folded)


def test_prompt_and_completion_columns_do_as_well_as_messages():
    row = {"prompt": "What is 2 + 2?", "completion": "4", "privileged_messages": [DRAFT, CHECK]}
    assert prompt_text(row) == chatml_text(QUESTION, DRAFT, CHECK)


def test_full_takes_the_rows_own_teacher_messages_without_their_last_answer():
    row = {"messages": [QUESTION, ANSWER], "teacher_messages": [SYSTEM, QUESTION, DRAFT, CHECK, FIX]}
    assert prompt_text(row, teacher_prompt="full") == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK)


def test_concat_joins_the_opened_prompt_and_the_privileged_messages_and_opens_no_turn_behind():
    expected = chatml_text(SYSTEM, QUESTION) + chatml_text(DRAFT, CHECK, opened=False)
    assert prompt_text(ROW, layout="concat") == expected
    student = rendered(ROW, chatml()).prompt_ids
    assert prompt_of(ROW, layout="concat").ids[: len(student)] == student


@pytest.mark.parametrize("build", [chatml, llama3, lambda: chatml(THINKING), plain, plain_with_bos])
def test_the_teachers_prompt_is_the_students_of_a_longer_conversation(build):
    tokenizer = build()
    longer = {"messages": [*ROW["messages"][:2], DRAFT, CHECK]}
    assert prompt_of(ROW, tokenizer).ids == rendered(longer, tokenizer).prompt_ids


def test_a_bos_stands_once_at_the_beginning():
    for tokenizer in (llama3(), plain_with_bos()):
        ids = prompt_of(ROW, tokenizer).ids
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


# Rows that hold nothing privileged

EMPTY = [
    {"privileged_messages": []},
    {"privileged_messages": None},
    {"privileged_messages": ""},
    {"privileged": " \n"},
    {"privileged_messages": [{"role": "user", "content": " "}]},
]


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_an_empty_row_is_refused_kept_or_skipped(empty):
    row = {"messages": [SYSTEM, QUESTION, ANSWER], **empty}
    refusal(row, next(iter(empty)), "method.on_empty_privileged")
    student = rendered(row, chatml()).prompt_ids
    for layout in ("template", "concat"):
        kept = prompt_of(row, on_empty="keep", layout=layout)
        assert kept == TeacherPrompt(student, is_empty=True)
    assert prompt_of(row, on_empty="skip") == TeacherPrompt(None, "empty_privileged", is_empty=True)


@pytest.mark.parametrize("own", [[], None, [SYSTEM, QUESTION], [SYSTEM, QUESTION, FIX]], ids=str)
def test_teacher_messages_that_only_repeat_the_prompt_are_empty(own):
    row = {"messages": [SYSTEM, QUESTION, ANSWER], "teacher_messages": own}
    refusal(row, "teacher_messages", teacher_prompt="full")
    assert prompt_of(row, teacher_prompt="full", on_empty="keep").is_empty


def test_a_row_without_the_column_is_refused_whatever_empty_rows_are():
    row = {"messages": [QUESTION, ANSWER], "chain": []}
    for on_empty in ("error", "keep", "skip"):
        parts = ("privileged_messages or privileged", "columns found: messages, chain", "data.columns")
        refusal(row, *parts, on_empty=on_empty)
    refusal(row, "no column teacher_messages", teacher_prompt="full")


def test_messages_that_are_none_are_refused_with_their_column():
    refusal({**ROW, "privileged_messages": 3}, "privileged_messages must be a list of messages, got int")
    refusal({**ROW, "privileged_messages": [{"role": "judge", "content": "x"}]}, "privileged_messages[0]", "'judge'")
    refusal({**ROW, "teacher_messages": "x"}, "teacher_messages must be", "got str", teacher_prompt="full")


def test_a_string_without_a_user_message_to_join_is_refused():
    refusal({"messages": [SYSTEM, ANSWER], "privileged": "The answer is 4."}, "no user message")


def test_a_template_that_refuses_the_longer_conversation_names_the_row():
    row = {"messages": [QUESTION, ANSWER], "privileged_messages": [SYSTEM]}
    tokenizer = chatml(
        "{% for m in messages %}{% if m['role'] == 'system' and loop.index0 > 0 %}"
        "{{ raise_exception('system comes first') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="row 7: the chat template refuses this row"):
        prompt_of(row, tokenizer)


# Limits


def test_the_oldest_privileged_messages_go_first_and_are_counted():
    row = {**ROW, "privileged_messages": [DRAFT, CHECK, FIX, CHECK]}
    room = num_tokens(chatml_text(SYSTEM, QUESTION, FIX, CHECK))
    whole = num_tokens(chatml_text(SYSTEM, QUESTION, DRAFT, CHECK, FIX, CHECK))
    for limit, kept, dropped in [
        (whole, [DRAFT, CHECK, FIX, CHECK], 0),
        (whole - 1, [CHECK, FIX, CHECK], 1),
        (room, [FIX, CHECK], 2),
        (room - 1, [CHECK], 3),
    ]:
        prompt = prompt_of(row, max_length=limit)
        assert text(chatml(), prompt.ids) == chatml_text(SYSTEM, QUESTION, *kept)
        assert prompt.num_messages_dropped == dropped


def test_the_bridge_stays_and_counts():
    row = {**ROW, "privileged_messages": [DRAFT, CHECK, FIX]}
    bridge = {"role": "user", "content": "Answer again."}
    limit = num_tokens(chatml_text(SYSTEM, QUESTION, FIX, bridge))
    assert prompt_text(row, max_length=limit) == chatml_text(SYSTEM, QUESTION, FIX, bridge)


@pytest.mark.parametrize("settings", [{}, {"layout": "concat"}, {"teacher_prompt": "full"}], ids=str)
def test_a_row_whose_last_privileged_message_does_not_fit_is_not_used(settings):
    row = {**ROW, "teacher_messages": [SYSTEM, QUESTION, DRAFT, CHECK]}
    prompt = prompt_of(row, max_length=num_tokens(chatml_text(SYSTEM, QUESTION)), **settings)
    assert prompt == TeacherPrompt(None, "privileged_too_long")


def test_teacher_messages_lose_their_oldest_only_where_they_begin_with_the_prompt():
    limit = num_tokens(chatml_text(SYSTEM, QUESTION, CHECK))
    row = {"messages": [SYSTEM, QUESTION, ANSWER], "teacher_messages": [SYSTEM, QUESTION, DRAFT, CHECK]}
    assert prompt_text(row, teacher_prompt="full", max_length=limit) == chatml_text(SYSTEM, QUESTION, CHECK)
    other = {**row, "messages": [QUESTION, ANSWER]}
    assert prompt_of(other, teacher_prompt="full", max_length=limit).reason == "privileged_too_long"


def test_concat_drops_the_oldest_as_well():
    student = chatml_text(SYSTEM, QUESTION)
    limit = num_tokens(student) + num_tokens(chatml_text(CHECK, opened=False))
    assert prompt_text(ROW, layout="concat", max_length=limit) == student + chatml_text(CHECK, opened=False)


# In a file


@pytest.fixture
def load(tmp_path):
    def load(rows, *, completions="unused", columns=None, **settings):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        needs = Needs(completions=completions, privileged=replace(SETTINGS, **settings))
        tokenizer = chatml()
        return load_examples(
            path,
            tokenizer,
            needs=needs,
            stop_ids=stop_ids(tokenizer),
            limit=None,
            max_prompt_length=None,
            max_completion_length=None,
            columns=columns,
        )

    return load


ROWS = [ROW, {**ROW, "privileged_messages": []}, {**ROW, "privileged_messages": [DRAFT, CHECK, FIX, CHECK]}]


@pytest.mark.parametrize("completions", ["unused", "optional", "required"])
def test_every_example_of_a_file_has_the_teachers_prompt(load, completions):
    examples = load(ROWS[:1], completions=completions)
    assert list(examples[0].teacher_prompts) == ["teacher"]
    assert text(chatml(), examples[0].teacher_prompts["teacher"]) == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK)


def test_what_is_empty_or_left_out_is_counted(load):
    limit = max(num_tokens(chatml_text(SYSTEM, QUESTION, first, CHECK)) for first in (DRAFT, FIX))
    kept = load(ROWS, on_empty="keep", max_length=limit)
    assert kept[1].teacher_prompts["teacher"] == kept[1].prompt_ids
    counts = {"empty_privileged": 1, "privileged_messages_dropped": 2}
    assert {name: kept.summary[name] for name in counts} == counts
    assert (kept.summary["kept"], kept.summary["dropped"]) == (3, {})
    skipped = load(ROWS, on_empty="skip", max_length=limit)
    assert [example.row for example in skipped] == [1, 3]
    assert {name: skipped.summary[name] for name in counts} == counts
    assert skipped.summary["dropped"] == {"empty_privileged": 1}


def test_an_empty_row_of_a_file_is_refused_by_its_number(load):
    with pytest.raises(ConfigError, match=r"train\.jsonl, row 2: privileged_messages holds nothing"):
        load(ROWS)


def test_the_privileged_column_may_have_another_name(load):
    rows = [{"messages": ROW["messages"], "chain": ROW["privileged_messages"]}]
    (example,) = load(rows, columns={"privileged_messages": "chain"})
    assert text(chatml(), example.teacher_prompts["teacher"]) == chatml_text(SYSTEM, QUESTION, DRAFT, CHECK)


def test_a_file_of_empty_rows_and_one_of_long_ones_are_refused_with_their_remedy(load):
    with pytest.raises(ConfigError, match=r"\(empty_privileged 1\); fill in"):
        load(ROWS[1:2], on_empty="skip")
    with pytest.raises(ConfigError, match=r"privileged_too_long 1.*method\.max_privileged_length"):
        load(ROWS[:1], max_length=1)
