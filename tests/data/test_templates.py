"""Chat templates from elsewhere: a file, a packaged name, TRL's for training; thinking modes; system prompts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_rows import SAMPLES, loaded, questions, refused, write_lines
from rendering import TWO_TURNS, loss_texts, rendered, text
from small_tokenizers import CHATML, LLAMA3, THINKING, chatml, gemma, llama3, plain
from transformers import AutoTokenizer

from opd.data.templates import packaged_templates, set_template, template_digest
from opd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi."},
    {"role": "user", "content": "And you?"},
    {"role": "assistant", "content": "<think>\nA question.\n</think>\n\nFine."},
]
# As Qwen3: thoughts before the last user's turn are stripped, the last turn always shows a block of them, and the
# prompt opens an empty one where thinking is off.
MODES = THINKING.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
# As Llama 3.1: a BOS, and a date in a system turn that is always there.
DATED = LLAMA3.replace(
    "{{ bos_token }}", "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024<|eot_id|>"
)


def qwen3():
    """A small tokenizer with Qwen3's own template, from the library that knows it."""
    from trl.chat_template_utils import qwen3_chat_template

    return chatml(qwen3_chat_template)


def opened(tokenizer):
    messages = [{"role": "user", "content": "Hello there"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def refuse(tokenizer, chosen, thinking, *parts, prefix="model.student."):
    with pytest.raises(ConfigError) as caught:
        set_template(tokenizer, chosen, thinking, prefix)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    for part in parts:
        assert part in message, message


def test_a_template_that_strips_earlier_thoughts_is_refused_with_the_key_that_helps():
    for tokenizer in (chatml(THINKING), qwen3()):
        with pytest.raises(ConfigError, match=r"not prefix-stable.*model\.student\.chat_template=training"):
            rendered({"messages": TALK}, tokenizer, turns="all")


def test_trls_training_template_keeps_every_turn_as_it_was_sampled():
    tokenizer = qwen3()
    set_template(tokenizer, "training", None, "model.student.")
    example = rendered({"messages": TALK}, tokenizer, turns="all")
    assert loss_texts(example, tokenizer) == [TALK[1]["content"] + "<|im_end|>", TALK[3]["content"] + "<|im_end|>"]


def test_a_family_that_trl_does_not_know_is_refused():
    refuse(chatml(), "training", None, "model.student.chat_template=training", "TRL has no training template")
    refuse(
        plain(), "training", None, "model.teacher.chat_template=training", "no chat template", prefix="model.teacher."
    )


@pytest.mark.parametrize("family", [qwen3, lambda: chatml(MODES)])
def test_thinking_fixes_the_mode_of_every_rendering(family):
    off, on, own = family(), family(), family()
    set_template(off, None, False, "model.student.")
    set_template(on, None, True, "model.student.")
    assert opened(off) == opened(own) + "<think>\n\n</think>\n\n"
    assert opened(on) == opened(own)
    messages = [{"role": "user", "content": "Hello there"}]
    other = on.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert other == opened(on)


def test_the_mode_is_saved_with_the_tokenizer_and_can_be_changed_again(tmp_path):
    tokenizer = chatml(MODES)
    set_template(tokenizer, None, False, "model.student.")
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert opened(saved) == opened(tokenizer)
    set_template(saved, None, True, "model.student.")
    assert opened(saved) == opened(chatml(MODES))


def test_an_answer_without_thoughts_trains_in_a_conversation_without_thinking():
    tokenizer = qwen3()
    set_template(tokenizer, None, False, "model.student.")
    example = rendered({"prompt": "Hello there", "completion": "Hi."}, tokenizer)
    assert text(tokenizer, example.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text(tokenizer, example.completion_ids) == "Hi.<|im_end|>"


def test_thinking_of_a_template_that_knows_none_is_refused():
    for tokenizer in (chatml(), plain()):
        refuse(tokenizer, None, True, "model.student.thinking=true", "enable_thinking", "set it to null")


def test_both_can_be_chosen_together():
    tokenizer = qwen3()
    set_template(tokenizer, "training", False, "model.student.")
    assert opened(tokenizer).endswith("<think>\n\n</think>\n\n")
    plain_talk = [{**m, "content": m["content"].split("\n\n")[-1]} for m in TALK]
    example = rendered({"messages": plain_talk}, tokenizer, turns="all")
    assert loss_texts(example, tokenizer) == ["Hi.<|im_end|>", "Fine.<|im_end|>"]


def test_packaged_templates_render_what_their_names_say():
    tokenizer = chatml(None)
    set_template(tokenizer, "chatml", None, "model.student.")
    own = chatml(CHATML)
    for open_turn in (False, True):
        asked = {"tokenize": False, "add_generation_prompt": open_turn}
        assert tokenizer.apply_chat_template(TWO_TURNS, **asked) == own.apply_chat_template(TWO_TURNS, **asked)
    tokenizer = plain()
    set_template(tokenizer, "zephyr", None, "model.student.")
    assert opened(tokenizer) == "<|user|>\nHello there<|endoftext|>\n<|assistant|>\n"
    example = rendered({"messages": TWO_TURNS}, tokenizer, turns="all")
    assert loss_texts(example, tokenizer) == ["Hi, how are you?<|endoftext|>", "I am fine, 谢谢.<|endoftext|>"]


def test_packaged_templates_are_found_from_an_installed_package(tmp_path):
    """A wheel holds conf inside the package."""
    for name in ("opd", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "opd" / ("" if name == "opd" else name), dirs_exist_ok=True)
    program = "import opd.data.templates as t; print(t.__file__, *sorted(t.packaged_templates()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and names == sorted(packaged_templates()) == ["chatml", "zephyr"]


def test_a_template_from_a_file_and_its_troubles(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    tokenizer = plain()
    set_template(tokenizer, str(file), None, "model.student.")
    assert opened(tokenizer) == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    file.write_text("{% for m in messages %}")
    refuse(plain(), str(file), None, f"model.student.chat_template={file}", "not a Jinja template")
    file.write_text("{{ raise_exception('only images') }}")
    refuse(plain(), str(file), None, "cannot render a user's message", "only images")
    file.write_bytes(b"\xff\xfe")
    refuse(plain(), str(file), None, "UTF-8")
    refuse(plain(), "chatlm", None, "model.student.chat_template=chatlm", "no such file", "training, chatml, zephyr")


def test_what_tells_templates_apart_is_their_text(tmp_path):
    file = tmp_path / "mine.jinja"
    shutil.copy(packaged_templates()["chatml"], file)
    assert template_digest(str(file)) == template_digest("chatml") != template_digest("zephyr")
    file.write_text("{{ messages }}")
    assert template_digest(str(file)) != template_digest("chatml")
    assert "trl" in template_digest("training")


def test_a_dated_system_turn_and_a_bos_stand_once_in_every_prompt():
    tokenizer = llama3()
    tokenizer.chat_template = DATED
    example = rendered({"messages": TWO_TURNS[1:]}, tokenizer, turns="all")
    assert text(tokenizer, example.prompt_ids).count("Today") == 1
    assert example.prompt_ids.count(tokenizer.bos_token_id) == 1


SYSTEM = "data.system_prompt=Be kind."


def test_the_system_prompt_stands_before_conversations_that_bring_none(tmp_path):
    rows = [
        {"messages": TWO_TURNS},  # brings its own
        {"messages": TWO_TURNS[1:]},
        {"prompt": "Hello there", "completion": "Hi."},
        {"prompt": TWO_TURNS[1:2], "completion": "Hi."},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    words = ("data=file", f"data.path={path}", "data.eval_prompts=0", "model/teacher=none")
    found = [chatml().decode(loaded(*words, "method=sft", SYSTEM).train[k].prompt_ids) for k in range(4)]
    assert [("Be kind." in one, "Be brief." in one) for one in found] == [(False, True)] + [(True, False)] * 3
    assert all(one.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello") for one in found[1:])
    bare = loaded(*words, "method=sft").train[2]
    assert "system" not in chatml().decode(bare.prompt_ids)


def test_both_answers_of_a_pair_and_both_prompts_of_opsd_get_the_system_prompt(tmp_path):
    data = loaded("data=dpo_mix_7k", f"data.path={SAMPLES / 'dpo_mix_7k'}", "method=dpo", "model/teacher=none", SYSTEM)
    assert chatml().decode(data.train[0].prompt_ids).startswith("<|im_start|>system\nBe kind.")
    row = {"messages": TALK[:2], "privileged_messages": [{"role": "user", "content": "Psst."}]}
    row["teacher_messages"] = [*TALK[:1], *row["privileged_messages"]]
    path = write_lines(tmp_path / "rows.jsonl", [row])
    words = ("data=opsd", f"data.path={path}", "method=opsd", "model/teacher=none", SYSTEM)
    for more in ((), ("method.teacher_prompt=full",)):
        example = loaded(*words, *more).train[0]
        assert chatml().decode(example.prompt_ids).startswith("<|im_start|>system\nBe kind.")
        assert chatml().decode(example.teacher_prompts["teacher"]).startswith("<|im_start|>system\nBe kind.")


def test_a_template_without_a_system_role_says_so_itself(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", questions(1))
    words = ("data=file", f"data.path={path}", "data.eval_prompts=0", "method=sft", "model/teacher=none", SYSTEM)
    refused(*words, tokenizer=gemma(), parts=["data.system_prompt=Be kind.", "System role not supported"])


def test_an_empty_conversation_stays_empty(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": " ", "completion": "x"}])
    words = ("data=file", f"data.path={path}", "data.eval_prompts=0", "method=sft", "model/teacher=none", SYSTEM)
    refused(*words, parts=["row 1", "the prompt is empty"])
