import pytest
import small_tokenizers
from rendering import TWO_TURNS, WHERE, loss_texts, refusal, rendered, text
from small_tokenizers import chatml, gemma, plain

from opd.data.chat import render
from opd.data.columns import without_completion
from opd.errors import ConfigError

# Rows that are refused


@pytest.mark.parametrize("prompt", ["", " \n\t", [], [{"role": "user", "content": " "}]])
@pytest.mark.parametrize("build", [chatml, plain])
def test_an_empty_prompt_is_refused(prompt, build):
    refusal({"prompt": prompt, "completion": "Hi"}, "empty", tokenizer=build())
    refusal({"prompt": prompt}, "empty", "remove the row", tokenizer=build())


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_none_is_refused(column):
    refusal({column: None}, f"{column} is None")


def test_a_value_of_the_wrong_type_is_refused():
    refusal({"prompt": 3}, "got int")
    refusal({"prompt": "a", "completion": 42}, "completion must be", "got int")
    refusal({"messages": "[]"}, "messages must be a list", "got str")
    refusal({"messages": ["hi"]}, "messages[0] is str")


def test_a_prompt_that_ends_in_an_assistant_turn_is_refused():
    refusal({"prompt": TWO_TURNS}, "ends in an assistant turn", "messages")


def test_a_completion_that_does_not_end_in_an_assistant_turn_is_refused():
    refusal({"prompt": "a", "completion": TWO_TURNS[:2]}, "completion ends in a turn of the user")


@pytest.mark.parametrize(
    ("role", "meant"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("asistant", "assistant")],
)
def test_an_unknown_role_is_refused_with_the_role_that_was_meant(role, meant):
    refusal({"messages": [{"role": role, "content": "x"}]}, repr(role), f"did you mean {meant}?")


def test_messages_without_role_or_content_are_refused():
    refusal({"messages": [{"from": "human", "value": "x"}]}, "messages[0]", "role", "from, value")
    refusal({"messages": [{"role": "user"}]}, "content, got nothing")
    refusal({"messages": [{"role": "user", "content": None}]}, "content, got NoneType")
    refusal({"messages": [{"role": 1, "content": "x"}]}, "role, got int")


def test_unknown_columns_are_refused_with_what_is_there_and_what_is_close():
    refusal(
        {"promt": "a", "answer\nkey": "b"},
        "columns found: promt, answer key",
        "promt for prompt",
        "data.columns",
    )


def test_an_empty_completion_is_refused():
    refusal({"prompt": "a", "completion": ""}, "completion is empty")
    refusal({"prompt": "a", "completion": " \n"}, "completion is empty", tokenizer=plain())
    refusal({"prompt": "a", "completion": []}, "completion is empty")
    silent = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    refusal({"messages": silent}, "completion is empty (message 1")
    refusal({"messages": silent + TWO_TURNS[1:3]}, "completion is empty (message 1", turns="all")


def test_a_conversation_that_the_assistant_begins_is_refused_where_its_turn_would_be_trained_on():
    begun = [{"role": "assistant", "content": "Welcome"}, *TWO_TURNS[1:3]]
    refusal({"messages": begun}, "begins with the assistant", turns="all")
    assert loss_texts(rendered({"messages": begun}, chatml()), chatml()) == ["Hi, how are you?<|im_end|>"]


def test_what_the_template_refuses_is_refused_in_its_words():
    refusal({"messages": TWO_TURNS}, "System role not supported", tokenizer=gemma())


@pytest.mark.parametrize("hidden", ["user", "assistant"])
def test_a_template_that_leaves_out_what_a_message_says_is_refused(hidden):
    tokenizer = chatml(small_tokenizers.CHATML.replace("m['content']", f"m['content'] if m['role'] != '{hidden}'"))
    number = {"user": 0, "assistant": 1}[hidden]
    fields = {"prompt": "Hello", "completion": "Hi"}
    refusal(fields, f"does not show the content of message {number}", tokenizer=tokenizer)
    if hidden == "user":
        refusal({"prompt": "Hello"}, "does not show the content of message 0", tokenizer=tokenizer)


def test_a_template_that_shows_nothing_is_refused():
    fields = {"messages": [{"role": "system", "content": "Be brief."}]}
    refusal(fields, "no tokens", tokenizer=chatml("{# nothing #}"))


def test_text_is_refused_where_a_prompt_is_needed_and_where_it_is_empty():
    refusal({"text": "Hello"}, "no prompt")
    for value in ("", " \n", None, 3):
        refusal({"text": value}, "text must be", turns="all")


def test_a_completion_that_nothing_can_close_is_refused():
    tokenizer = plain(eos_token=None)
    with pytest.raises(ConfigError, match=r"row 7: .*no EOS"):
        render(
            {"prompt": "a", "completion": "b"},
            tokenizer,
            turns="last",
            stop_ids=frozenset(),
            row=7,
            where=WHERE,
        )


def test_half_a_character_is_refused():
    refusal({"prompt": "a\ud800b"}, "surrogate", "\\ud800")


# The row around it


def test_the_example_keeps_the_row_number_and_its_columns():
    example = rendered({"prompt": "Hello", "answer": 42}, chatml())
    assert example.row == 7
    assert example.fields == {"prompt": "Hello", "answer": 42}


def test_rendering_leaves_the_row_as_it_was():
    fields = {"messages": [dict(message) for message in TWO_TURNS]}
    rendered(fields, chatml(), "all")
    assert fields == {"messages": TWO_TURNS}


def test_messages_go_before_prompt_and_prompt_before_text():
    tokenizer = chatml()
    fields = {"messages": TWO_TURNS[:2], "prompt": "other", "text": "another"}
    assert "Hello there" in text(tokenizer, rendered(fields, tokenizer).prompt_ids)
    del fields["messages"]
    assert "user\nother<" in text(tokenizer, rendered(fields, tokenizer, "all").prompt_ids)


def test_a_completion_of_none_is_no_completion():
    assert rendered({"prompt": "Hello", "completion": None}, chatml()).completion_ids is None


def test_without_completion_drops_the_last_answer_and_nothing_else():
    assert without_completion({"prompt": "a", "completion": "", "n": 1}) == {"prompt": "a", "n": 1}
    assert without_completion({"messages": TWO_TURNS}) == {"messages": TWO_TURNS[:-1]}
    assert without_completion({"messages": TWO_TURNS[:4]}) == {"messages": TWO_TURNS[:4]}
    assert without_completion({"messages": None}) == {"messages": None}
