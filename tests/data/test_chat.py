import pytest
import small_tokenizers
from rendering import TWO_TURNS, loss_texts, refusal, rendered, text
from small_tokenizers import MERGING, OPEN, THINKING, chatml, gemma, llama3, pad_is_eos, plain, plain_with_bos

# Where the prompt ends


@pytest.mark.parametrize("build", [chatml, pad_is_eos, llama3])
def test_the_prompt_is_what_the_template_gives_a_model_that_samples(build):
    tokenizer = build()
    expected = tokenizer.apply_chat_template(
        TWO_TURNS[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert rendered({"messages": TWO_TURNS}, tokenizer).prompt_ids == expected


def test_a_prompt_string_is_one_user_message():
    tokenizer = chatml()
    example = rendered({"prompt": "Hello"}, tokenizer)
    assert text(tokenizer, example.prompt_ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert example.completion_ids is None and example.completion_mask is None


def test_messages_that_end_in_a_user_turn_are_a_prompt_only():
    tokenizer = chatml()
    for turns in ("last", "all"):
        fields = {"messages": TWO_TURNS[:2]}
        example = rendered(fields, tokenizer, turns)
        assert text(tokenizer, example.prompt_ids).endswith("Hello there<|im_end|>\n<|im_start|>assistant\n")
        assert example.completion_ids is None
    example = rendered({"messages": TWO_TURNS[:4]}, tokenizer, "last")
    assert "Hi, how are you?" in text(tokenizer, example.prompt_ids)
    assert example.completion_ids is None


def test_a_template_with_a_bos_gets_no_second_one():
    tokenizer = llama3()
    example = rendered({"prompt": "Hello", "completion": "Hi"}, tokenizer)
    assert (example.prompt_ids + example.completion_ids).count(tokenizer.bos_token_id) == 1
    assert example.prompt_ids[0] == tokenizer.bos_token_id


# What is a loss token


@pytest.mark.parametrize("build", [chatml, pad_is_eos])
def test_the_last_turn_is_the_completion_up_to_its_end_token(build):
    tokenizer = build()
    example = rendered({"messages": TWO_TURNS}, tokenizer)
    assert loss_texts(example, tokenizer) == ["I am fine, 谢谢.<|im_end|>"]
    assert example.completion_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.completion_mask is None


@pytest.mark.parametrize("build", [chatml, pad_is_eos])
def test_all_turns_are_loss_tokens_and_what_lies_between_is_not(build):
    tokenizer = build()
    example = rendered({"messages": TWO_TURNS}, tokenizer, "all")
    assert text(tokenizer, example.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loss_texts(example, tokenizer) == ["Hi, how are you?<|im_end|>", "I am fine, 谢谢.<|im_end|>"]
    assert text(tokenizer, example.completion_ids) == (
        "Hi, how are you?<|im_end|>\n<|im_start|>user\nFine. And you?<|im_end|>\n<|im_start|>assistant\n"
        "I am fine, 谢谢.<|im_end|>"
    )


def test_a_user_turn_behind_the_last_assistant_turn_is_cut():
    tokenizer = chatml()
    example = rendered({"messages": TWO_TURNS[:4]}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["Hi, how are you?<|im_end|>"]
    assert text(tokenizer, example.completion_ids) == "Hi, how are you?<|im_end|>"


def test_llama_and_gemma_turns_end_in_their_own_tokens():
    tokenizer = llama3()
    expected = ["Hi, how are you?<|eot_id|>", "I am fine, 谢谢.<|eot_id|>"]
    assert loss_texts(rendered({"messages": TWO_TURNS}, tokenizer, "all"), tokenizer) == expected
    tokenizer = gemma()
    example = rendered({"messages": TWO_TURNS[1:]}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == [
        "Hi, how are you?<end_of_turn>",
        "I am fine, 谢谢.<end_of_turn>",
    ]
    assert text(tokenizer, example.prompt_ids).endswith("<start_of_turn>model\n")


def test_a_completion_column_alone_is_the_loss_even_if_the_prompt_has_assistant_turns():
    tokenizer = chatml()
    fields = {"prompt": TWO_TURNS[:4], "completion": "Same."}
    for turns in ("last", "all"):
        assert loss_texts(rendered(fields, tokenizer, turns), tokenizer) == ["Same.<|im_end|>"]
    fields["completion"] = [{"role": "assistant", "content": "Same."}]
    assert loss_texts(rendered(fields, tokenizer), tokenizer) == ["Same.<|im_end|>"]


def test_a_completion_of_several_turns_has_loss_in_its_assistant_turns():
    tokenizer = chatml()
    fields = {"prompt": TWO_TURNS[:2], "completion": TWO_TURNS[2:]}
    both = ["Hi, how are you?<|im_end|>", "I am fine, 谢谢.<|im_end|>"]
    assert loss_texts(rendered(fields, tokenizer, "all"), tokenizer) == both
    assert loss_texts(rendered(fields, tokenizer, "last"), tokenizer) == both[1:]


def test_pad_tokens_written_in_a_row_are_real_tokens():
    tokenizer = chatml()
    fields = {"prompt": "Hello", "completion": "a<|endoftext|>b"}
    assert loss_texts(rendered(fields, tokenizer), tokenizer) == ["a<|endoftext|>b<|im_end|>"]


def test_a_stop_token_inside_the_content_does_not_end_the_turn():
    tokenizer = chatml()
    messages = [*TWO_TURNS[:2], {"role": "assistant", "content": "a<|im_end|>b"}, *TWO_TURNS[3:]]
    example = rendered({"messages": messages}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["a<|im_end|>b<|im_end|>", "I am fine, 谢谢.<|im_end|>"]


def test_what_a_template_writes_behind_the_end_token_is_cut_even_if_it_is_a_stop_token():
    tokenizer = chatml()
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    example = rendered({"prompt": "Hello", "completion": "Hi"}, tokenizer)
    assert text(tokenizer, example.completion_ids) == "Hi<|im_end|>"


def test_a_template_that_closes_only_the_whole_conversation_serves_all_turns():
    tokenizer = chatml()
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    example = rendered({"messages": TWO_TURNS}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["Hi, how are you?<|im_end|>", "I am fine, 谢谢.<|im_end|>"]
    assert "<|endoftext|>" not in text(tokenizer, example.completion_ids)


def test_a_template_that_closes_no_turn_gets_the_eos():
    tokenizer = chatml(OPEN)
    example = rendered({"prompt": "Hello", "completion": "Hi"}, tokenizer)
    assert text(tokenizer, example.prompt_ids) == "Question: Hello\nAnswer:\n"
    assert text(tokenizer, example.completion_ids) == "Hi\n<|im_end|>"
    example = rendered({"messages": TWO_TURNS}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["Hi, how are you?\n", "I am fine, 谢谢.\n<|im_end|>"]


# Without a template


def test_without_a_template_contents_are_concatenated_and_the_eos_appended():
    tokenizer = plain()
    example = rendered({"prompt": "What is 2 + 2?", "completion": " It is 4."}, tokenizer)
    assert text(tokenizer, example.prompt_ids) == "What is 2 + 2?"
    assert text(tokenizer, example.completion_ids) == " It is 4.<|endoftext|>"
    assert example.prompt_ids + example.completion_ids[:-1] == tokenizer("What is 2 + 2? It is 4.")["input_ids"]


def test_without_a_template_the_tokenizers_own_bos_stands_in_front_once():
    tokenizer = plain_with_bos()
    for prompt in ("Hello", "<s>Hello"):
        example = rendered({"prompt": prompt, "completion": " there"}, tokenizer)
        assert text(tokenizer, example.prompt_ids) == "<s>Hello"
        assert text(tokenizer, example.completion_ids) == " there</s>"
    assert text(tokenizer, rendered({"prompt": "Hello"}, tokenizer).prompt_ids) == "<s>Hello"


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added():
    tokenizer = plain(bos_token="<|endoftext|>")
    assert text(tokenizer, rendered({"prompt": "Hello"}, tokenizer).prompt_ids) == "Hello"


def test_a_plain_completion_does_not_merge_into_the_prompt():
    tokenizer = plain()
    assert len(tokenizer(" France")["input_ids"]) == 1, "the tokenizer must merge the two for this test"
    example = rendered({"prompt": "the capital of Fra", "completion": "nce"}, tokenizer)
    assert example.prompt_ids == tokenizer("the capital of Fra")["input_ids"]
    assert text(tokenizer, example.completion_ids) == "nce<|endoftext|>"


def test_plain_turns_are_told_apart_by_the_mask():
    tokenizer = plain()
    example = rendered({"messages": TWO_TURNS}, tokenizer, "all")
    assert text(tokenizer, example.prompt_ids) == "Be brief.Hello there"
    assert loss_texts(example, tokenizer) == ["Hi, how are you?", "I am fine, 谢谢.<|endoftext|>"]


def test_stop_tokens_in_plain_text_are_tokens_like_any_other():
    tokenizer = plain()
    example = rendered({"prompt": "a", "completion": "b<|endoftext|>c"}, tokenizer)
    assert text(tokenizer, example.completion_ids) == "b<|endoftext|>c<|endoftext|>"
    example = rendered({"prompt": "a", "completion": "b<|endoftext|>"}, tokenizer)
    assert text(tokenizer, example.completion_ids) == "b<|endoftext|>"


def test_running_text_is_all_loss_but_the_bos():
    tokenizer = plain_with_bos()
    example = rendered({"text": "Hello there"}, tokenizer, "all")
    assert example.prompt_ids == []
    assert text(tokenizer, example.completion_ids) == "<s>Hello there</s>"
    assert example.completion_mask == [False] + [True] * (len(example.completion_ids) - 1)
    tokenizer = chatml()
    example = rendered({"text": "Hello there"}, tokenizer, "all")
    assert text(tokenizer, example.completion_ids) == "Hello there<|im_end|>"
    assert example.completion_mask is None


# Templates that rewrite what they said


def thoughtful(content):
    return [*TWO_TURNS[1:2], {"role": "assistant", "content": content}, *TWO_TURNS[3:]]


def test_a_template_that_strips_earlier_thoughts_is_refused_for_all_turns():
    tokenizer = chatml(THINKING)
    messages = thoughtful("<think>\nhm\n</think>\nHi")
    refusal(
        {"messages": messages},
        "not prefix-stable at message 1",
        "last turn only",
        tokenizer=tokenizer,
        turns="all",
    )


def test_a_template_that_strips_earlier_thoughts_serves_the_last_turn_and_rows_without_thoughts():
    tokenizer = chatml(THINKING)
    example = rendered({"messages": thoughtful("<think>\nhm\n</think>\nHi")}, tokenizer, "last")
    assert loss_texts(example, tokenizer) == ["I am fine, 谢谢.<|im_end|>"]
    assert "<think>" not in text(tokenizer, example.prompt_ids)
    example = rendered({"messages": thoughtful("Hi")}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["Hi<|im_end|>", "I am fine, 谢谢.<|im_end|>"]


def test_a_user_turn_that_is_cut_cannot_make_the_template_strip_thoughts():
    tokenizer = chatml(THINKING)
    messages = thoughtful("<think>\nhm\n</think>\nHi")[:3]
    example = rendered({"messages": messages}, tokenizer, "all")
    assert loss_texts(example, tokenizer) == ["<think>\nhm\n</think>\nHi<|im_end|>"]


def test_a_header_that_the_finished_turn_does_not_have_is_refused():
    tokenizer = chatml(small_tokenizers.CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    fields = {"prompt": "Hello", "completion": "Hi"}
    refusal(fields, "not prefix-stable at message 1", "finished turn", tokenizer=tokenizer)


def test_a_token_that_reaches_across_the_boundary_is_refused():
    fields = {"prompt": "Hello", "completion": "Paris"}
    refusal(fields, "not prefix-stable at message 1", "token", tokenizer=chatml(MERGING))
