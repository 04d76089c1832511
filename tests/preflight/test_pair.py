"""The pair's checks: a healthy pair passes, and each thing that is wrong is told as that and nothing else."""

from __future__ import annotations

import json

import pytest
from contract.variants import Variant, tiny_config
from data.small_tokenizers import CHATML, GEMMA, LLAMA3, TEXTS, THINKING, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.loading import Readers, load_method
from opd.preflight.pair import check_pair
from opd.tokenizers import Shape

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
ZEPHYR = CHATML.replace("<|im_start|>", "### ")
ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Says how many turns there are, so that every turn changes when another follows.
COUNTING = CHATML.replace("<|im_start|>", "{{ messages | length }}<|im_start|>", 1)
GKD = Variant("gkd", "pair")


def tokenizer(template=CHATML, specials=SPECIALS, **roles):
    return build(template, specials=specials, **{**ROLES, **roles})


def student_and_teacher(student, teacher=None, *, widths=(400, 400), stops=None, key="model.teacher.path"):
    tokenizers = {"model.student.path": student} | ({} if teacher is None else {key: teacher})
    eos = {k: frozenset({t.eos_token_id} - {None}) for k, t in tokenizers.items()}
    return Readers(
        dict(zip(tokenizers, ("org/pupil", "org/master"), strict=False)),
        tokenizers,
        {k: Shape(width, None) for k, width in zip(tokenizers, widths, strict=False)},
        eos | ({"model.student.path": frozenset(stops)} if stops is not None else {}),
    )


def found_by(readers, variant=GKD, **sections):
    config = tiny_config(variant, **sections)
    findings = check_pair(config, load_method(config), readers)
    assert all("\n" not in finding.line for finding in findings)
    return findings


def heeded(findings):
    return [(finding.severity, finding.check) for finding in findings if finding.severity != "note"]


def lines(findings, check):
    return [finding.line for finding in findings if finding.check == check]


def verdict(findings):
    (line,) = lines(findings, "pair.verdict")
    return line


def gold(**options):
    words = tuple(f"method.{name}={value}" for name, value in options.items())
    return Variant("gold", "pair", ("model.teacher.path=some/foreign_teacher", *words))


def trained(pieces, size=330, template=CHATML, texts=TEXTS, **roles):
    """A byte-level tokenizer with this pre-tokenizer in front."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **{**ROLES, **roles})


# Vocabularies


def test_two_models_of_one_family_pass():
    findings = found_by(student_and_teacher(tokenizer(), tokenizer()))
    assert heeded(findings) == []
    assert "same-tokenizer methods: org/master as teacher of org/pupil" in verdict(findings)


def test_a_teacher_of_the_same_size_with_other_ids_is_an_error():
    pupil, master = tokenizer(), trained([], texts=[text[::-1] for text in TEXTS], size=len(tokenizer()))
    assert len(pupil) == len(master)
    findings = found_by(student_and_teacher(pupil, master))
    assert heeded(findings) == [("error", "pair.tokenizer")]
    (line,) = lines(findings, "pair.tokenizer")
    assert "model.teacher.path=org/master" in line and "tokens differ, e.g." in line and "method=gold" in line
    assert "only gold: org/master" in verdict(findings)


def test_added_tokens_of_one_side_are_named():
    master = tokenizer()
    master.add_tokens(["<tool>"])
    findings = found_by(student_and_teacher(tokenizer(), master))
    assert heeded(findings) == [("error", "pair.tokenizer")]
    assert "added tokens of the teacher alone: 1 ('<tool>')" in lines(findings, "pair.tokenizer")[0]


def test_another_tokenizer_is_no_error_for_gold():
    master = trained([], texts=[text[::-1] for text in TEXTS])
    findings = found_by(student_and_teacher(tokenizer(), master), gold())
    assert heeded(findings) == []
    assert lines(findings, "pair.tokenizer")[0].startswith("note")
    assert "only gold" in verdict(findings)


def test_every_named_teacher_is_compared():
    variant = Variant("dckd", "pair", ("method.dpo_teacher=some/dpo_teacher",))
    master = trained([], texts=[text[::-1] for text in TEXTS])
    findings = found_by(student_and_teacher(tokenizer(), master, key="method.dpo_teacher"), variant)
    assert heeded(findings) == [("error", "pair.tokenizer")]
    assert "method.dpo_teacher=org/master" in lines(findings, "pair.tokenizer")[0]


def test_padded_embedding_tables_are_accepted_with_a_line():
    findings = found_by(student_and_teacher(tokenizer(), tokenizer(), widths=(151_936, 152_064)))
    assert heeded(findings) == []
    (line,) = lines(findings, "pair.width")
    assert "151,936" in line and "152,064" in line


def test_ids_beyond_an_embedding_table_are_an_error():
    findings = found_by(student_and_teacher(tokenizer(), tokenizer(), widths=(400, 300)))
    assert heeded(findings) == [("error", "pair.width")]
    assert "do not: org/master" in verdict(findings)


def test_one_vocabulary_that_cuts_text_otherwise_is_a_warning():
    state = json.loads(tokenizer().backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][::-1]
    master = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **ROLES)
    master.chat_template = CHATML
    assert master.get_vocab() == tokenizer().get_vocab()
    assert heeded(found_by(student_and_teacher(tokenizer(), master))) == [("warning", "pair.segmentation")]


# Ends and special tokens


def test_a_teacher_that_ends_in_what_the_student_goes_past_is_a_warning():
    base, instruct = tokenizer(None, eos_token="<|endoftext|>"), tokenizer(None)
    findings = found_by(student_and_teacher(base, instruct))
    assert heeded(findings) == [("warning", "pair.end")]
    (line,) = lines(findings, "pair.end")
    assert "ends its answers with '<|im_end|>', the student with '<|endoftext|>'" in line
    assert "generation_config.json" in line


def test_an_end_that_the_students_generation_config_lists_is_none_to_go_past():
    base = tokenizer(None, eos_token="<|endoftext|>")
    stops = [base.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    findings = found_by(student_and_teacher(base, tokenizer(None), stops=stops))
    assert heeded(findings) == []
    assert "eos '<|endoftext|>' for the student and '<|im_end|>'" in lines(findings, "pair.special_tokens")[0]


def test_a_base_whose_template_ends_turns_in_no_stop_token_is_a_warning():
    base = tokenizer(eos_token="<|endoftext|>")
    findings = found_by(student_and_teacher(base, tokenizer()))
    assert heeded(findings) == [("warning", "pair.turn_end")]
    assert "'<|im_end|>'" in lines(findings, "pair.turn_end")[0]
    assert heeded(found_by(student_and_teacher(base), Variant("sft", "pair", ("model/teacher=none",)))) == [
        ("warning", "pair.turn_end")
    ]


@pytest.mark.parametrize("pad, said", [("<|im_end|>", "pad is a stop token"), (None, "no pad token")])
def test_pad_that_is_eos_and_no_pad_are_notes(pad, said):
    findings = found_by(student_and_teacher(tokenizer(pad_token=pad), tokenizer()))
    assert heeded(findings) == []
    assert said in lines(findings, "pair.pad")[0]
    assert not lines(found_by(student_and_teacher(tokenizer(), tokenizer())), "pair.pad")


def test_golds_teacher_whose_template_ends_otherwise_than_its_eos_is_a_warning_where_the_end_is_compared():
    master = trained([], template=CHATML, texts=[text[::-1] for text in TEXTS], eos_token="<|endoftext|>")
    readers = student_and_teacher(tokenizer(), master)
    assert heeded(found_by(readers, gold(skip_teacher_eos="false"))) == [("warning", "pair.end")]
    assert heeded(found_by(readers, gold(skip_teacher_eos="true"))) == []


# BOS, templates, thinking


def with_bos(template=None, adds=True):
    return build(template, specials=SPECIALS, adds_bos=adds, bos_token="<s>", **ROLES)


def test_a_bos_that_one_of_them_puts_before_plain_text_is_a_warning():
    assert heeded(found_by(student_and_teacher(with_bos(), with_bos()))) == []
    findings = found_by(student_and_teacher(with_bos(adds=False), with_bos()))
    assert heeded(findings) == [("warning", "pair.bos")]
    assert "its own does, and the student's does not" in lines(findings, "pair.bos")[0]


@pytest.mark.parametrize(
    "head, severity, said",
    [
        ("{{ bos_token }}", "note", "both bring the BOS"),
        ("{{ bos_token }}{{ bos_token }}", "warning", "two BOS"),
        ("", "note", "its chat template does not"),
    ],
)
def test_the_templates_bos_is_counted(head, severity, said):
    readers = student_and_teacher(with_bos(head + CHATML), with_bos(head + CHATML))
    findings = found_by(readers)
    assert [(f.severity, said in f.line) for f in findings if f.check == "pair.bos"] == [(severity, True)]
    assert len(heeded(findings)) == (severity == "warning")


def test_another_template_is_a_warning_that_shows_both_prompts():
    findings = found_by(student_and_teacher(tokenizer(ZEPHYR), tokenizer()))
    assert heeded(findings) == [("warning", "pair.template")]
    (line,) = lines(findings, "pair.template")
    assert "student '### user" in line and "teacher '<|im_start|>user" in line
    assert "first at token 0: '#' and '<|im_start|>'" in line


def test_another_template_is_golds_own_business():
    master = trained([], template=ZEPHYR, texts=[text[::-1] for text in TEXTS])
    findings = found_by(student_and_teacher(tokenizer(), master), gold())
    assert heeded(findings) == []
    assert lines(findings, "pair.template")[0].startswith("note")


def test_golds_teacher_without_a_template_is_a_warning_and_the_verdict_says_do_not():
    master = trained([], template=None, texts=[text[::-1] for text in TEXTS])
    findings = found_by(student_and_teacher(tokenizer(), master), gold())
    assert heeded(findings) == [("warning", "pair.template")]
    assert "do not: org/master as teacher of org/pupil: the tokenizers differ, and the teacher has no chat" in verdict(
        findings
    )


def test_golds_teacher_without_an_end_cannot_be_used():
    master = trained([], texts=[text[::-1] for text in TEXTS], eos_token=None)
    assert "do not" in verdict(found_by(student_and_teacher(tokenizer(), master), gold()))


def test_a_student_without_a_template_is_told_what_is_done():
    findings = found_by(student_and_teacher(tokenizer(None), tokenizer(None)))
    assert heeded(findings) == []
    assert "one after the other" in lines(findings, "pair.no_template")[0]


def test_which_thinking_mode_is_in_effect_is_said():
    findings = found_by(student_and_teacher(tokenizer(SWITCHED), tokenizer(SWITCHED)))
    assert heeded(findings) == []
    (line,) = lines(findings, "pair.thinking")
    assert "model.student.thinking=None" in line and "it is on" in line
    assert not lines(found_by(student_and_teacher(tokenizer(), tokenizer())), "pair.thinking")


def test_thinking_in_one_of_them_alone_is_a_warning():
    silent = tokenizer("{%- set enable_thinking = false %}" + SWITCHED)
    readers = student_and_teacher(silent, tokenizer(SWITCHED))
    model = tiny_config(GKD).model
    student = model.student.model_copy(update={"thinking": False})
    on_policy = Variant("gkd", "pair", ("method.lmbda=1",))  # its rows need not show how an answer began
    findings = found_by(readers, on_policy, model={"student": student})
    assert heeded(findings) == [("warning", "pair.thinking")]
    assert "on for the teacher and off for the student" in lines(findings, "pair.thinking")[-1]


def test_a_template_that_changes_earlier_turns_is_a_warning_for_methods_that_learn_them():
    every_turn, last = (
        Variant("sft", "pair", ("model/teacher=none", f"method.loss_on={on}")) for on in ("assistant", "last_assistant")
    )
    assert heeded(found_by(student_and_teacher(tokenizer(COUNTING)), every_turn)) == [("warning", "pair.prefix")]
    findings = found_by(student_and_teacher(tokenizer(THINKING)), every_turn)
    assert heeded(findings) == []
    assert "with <think> text" in lines(findings, "pair.prefix")[0]
    assert not lines(found_by(student_and_teacher(tokenizer(THINKING)), last), "pair.prefix")
    assert not lines(found_by(student_and_teacher(tokenizer()), every_turn), "pair.prefix")


def test_a_template_that_refuses_the_system_prompt_is_a_warning():
    specials = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    names = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}
    readers = student_and_teacher(build(GEMMA, specials=specials, **names))
    variant = Variant("sft", "pair", ("model/teacher=none",))
    assert heeded(found_by(readers, variant)) == []
    assert heeded(found_by(readers, variant, data={"system_prompt": "Be brief."})) == [("warning", "pair.template")]


def test_golds_teacher_that_refuses_the_system_prompt_is_a_warning():
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    master = trained([], template=refuses, texts=[text[::-1] for text in TEXTS])
    readers = student_and_teacher(tokenizer(), master)
    assert heeded(found_by(readers, gold())) == []
    findings = found_by(readers, gold(), data={"system_prompt": "Be brief."})
    assert heeded(findings) == [("warning", "pair.template")]
    assert "model.teacher.path=org/master" in lines(findings, "pair.template")[0]


def test_llamas_template_is_read_as_it_is():
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    names = {"bos_token": "<|begin_of_text|>", "pad_token": "<|end_of_text|>"}
    instruct = build(LLAMA3, specials=specials, adds_bos=True, eos_token="<|eot_id|>", **names)
    base = build(None, specials=specials, adds_bos=True, eos_token="<|end_of_text|>", **names)
    assert heeded(found_by(student_and_teacher(instruct, instruct))) == []
    checks = heeded(found_by(student_and_teacher(base, instruct)))
    assert checks == [("warning", "pair.template"), ("warning", "pair.end")]


# Alignment


def test_digits_that_are_cut_otherwise_are_a_warning():
    numbers = [f"{n} plus {m} is {n + m}" for n in range(100, 400, 7) for m in range(100, 400, 13)]
    whole = trained([], size=900, texts=numbers)
    single = trained([pre_tokenizers.Digits(individual_digits=True)], size=300, texts=numbers)
    findings = found_by(student_and_teacher(single, whole), gold())
    assert heeded(findings) == [("warning", "pair.digits")]
    assert "1|2|3|4|5 (student)" in lines(findings, "pair.digits")[0]


def test_text_that_is_cut_otherwise_is_a_warning():
    from opd.preflight.coverage import SAMPLE

    letters, words = trained([], size=260), trained([], size=900, texts=[SAMPLE] * 3)
    findings = found_by(student_and_teacher(letters, words), gold())
    assert ("warning", "pair.alignment") in heeded(findings)


def test_tokens_that_do_not_spell_the_text_are_an_error_where_they_are_paired_by_it():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "[SEP]": 2}, unk_token="[UNK]"))
    master = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHATML, unk_token="[UNK]", eos_token="[SEP]")
    readers = student_and_teacher(tokenizer(), master)
    findings = found_by(readers, gold())
    assert heeded(findings) == [("error", "pair.alignment")]
    assert "do not" in verdict(findings)
    assert heeded(found_by(readers, gold(extended="false", hybrid="true"))) == []


# A teacher that only measures


def test_a_teacher_that_only_measures_spoils_no_training():
    variant = Variant("sft", "pair")
    findings = found_by(student_and_teacher(tokenizer(ZEPHYR), tokenizer()), variant)
    assert heeded(findings) == []
    assert "it only measures the student" in lines(findings, "pair.template")[0]
    master = trained([], texts=[text[::-1] for text in TEXTS])
    findings = found_by(student_and_teacher(tokenizer(), master), variant)
    assert heeded(findings) == [("error", "pair.tokenizer")]
    assert "evaluation.divergence=false" in lines(findings, "pair.tokenizer")[0]
