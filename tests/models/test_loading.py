"""How models are loaded: dtypes, the student's own base as teacher, code that a model brings, memory that is saved."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from contract.variants import compose
from e2e.model_folders import build_model, file_run, write_rows
from e2e.pair_rows import LORA
from transformers import AutoModelForCausalLM

from opd import pipeline
from opd.conditions import validated
from opd.data.collate import lay_out
from opd.errors import ConfigError
from opd.models import causal_lm, freeze
from opd.preflight import Checks
from opd.protocols import TokenView
from opd.sources import Sampling, sample
from opd.teachers import LocalTeacher, WithoutAdapter

DROPPING = LORA.replace("dropout:0.0", "dropout:0.5")
BF16 = "hardware.precision=bf16"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build_model(folder / "student")
    build_model(folder / "teacher", seed=1)
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def load(place, tmp_path):
    """All that a run loads before it begins."""
    from hydra.core.global_hydra import GlobalHydra

    def load(*more, student="student", teacher="teacher"):
        GlobalHydra.instance().clear()
        words = file_run(tmp_path / "run", place / "rows.jsonl", place / student, place / teacher, *more)
        config = validated(compose(*words, "run.preflight=off", "method.lmbda=1"))
        return pipeline._load(config, Checks(config))

    return load


def dtypes(model):
    """Of the frozen and of the trained weights."""
    parameters = list(model.parameters())
    return tuple({p.dtype for p in parameters if p.requires_grad is trained} for trained in (False, True))


NONE, FP32, HALF = set(), {torch.float32}, {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (NONE, FP32)),
        ((BF16,), (NONE, FP32)),
        ((BF16, "model.student.dtype=bfloat16"), (NONE, HALF)),
        ((LORA,), (FP32, FP32)),
        ((BF16, LORA), (HALF, FP32)),
        ((BF16, LORA, "model.student.dtype=float32"), (FP32, FP32)),
    ],
)
def test_frozen_weights_lie_in_bfloat16_and_trained_ones_do_not_unless_asked(load, words, expected):
    assert dtypes(load(*words).student) == expected


def test_an_adapter_that_goes_on_lies_on_a_base_in_bfloat16_too(load, place, tmp_path):
    load(LORA).student.save_pretrained(place / "adapter")
    shutil.copy(place / "student" / "tokenizer.json", place / "adapter")
    shutil.copy(place / "student" / "tokenizer_config.json", place / "adapter")
    assert dtypes(load(BF16, student="adapter").student) == (HALF, FP32)


def layout_of(loaded):
    rows = [loaded.texts.data.train[i] for i in range(4)]
    views = [
        TokenView(row.prompt_ids + row.completion_ids, [False] * len(row.prompt_ids) + [True] * len(row.completion_ids))
        for row in rows
    ]
    return lay_out(views, pad_id=loaded.texts.vocabulary.pad_id)


def stir(student):
    """Weights of an adapter that has learnt something."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("words", [(), (BF16,), ("model.student.quantization=4bit", "model.teacher.quantization=4bit")])
@pytest.mark.parametrize("continued", [False, True])
def test_the_base_of_an_adapter_is_a_teacher_without_a_second_copy(load, place, words, continued):
    if "4bit" in str(words):
        pytest.importorskip("bitsandbytes")
    if continued:
        first = load(DROPPING).student
        stir(first)
        first.save_pretrained(place / "learnt")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(place / "student" / name, place / "learnt")
        del first
        loaded = load(*words, student="learnt", teacher="student")
    else:
        loaded = load(*words, DROPPING, teacher="student")
        stir(loaded.student)
    gc.collect()
    teacher = loaded.teachers["teacher"]
    assert isinstance(teacher, LocalTeacher) and isinstance(teacher.model, WithoutAdapter)
    kind = type(causal_lm(loaded.student))
    mine = [model for model in gc.get_objects() if type(model) is kind and model.name_or_path == str(place / "student")]
    assert len(mine) == 1

    layout, student = layout_of(loaded), loaded.student.train()
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    alone = separate(loaded, place)
    told, expected = teacher.score(layout, []), alone.score(layout, [])
    torch.testing.assert_close(told.hidden, expected.hidden, rtol=0, atol=0)
    torch.testing.assert_close(told.head.weight, expected.head.weight, rtol=0, atol=0)
    torch.testing.assert_close(teacher.logprobs(layout, []), alone.logprobs(layout, []), rtol=0, atol=0)
    prompts = [loaded.texts.data.train[i].prompt_ids for i in range(4)]
    settings = {
        "addresses": [(0, "test", row) for row in range(4)],
        "sampling": Sampling(6),
        "vocabulary": loaded.texts.vocabulary,
    }
    ids = [answer.ids for answer in sample(teacher.model, prompts, **settings)]
    assert ids == [answer.ids for answer in sample(alone.model, prompts, **settings)]
    assert ids != [answer.ids for answer in sample(student, prompts, **settings)]
    # The student is as it was: in training, and its adapter is on and learns.
    assert student.training
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == trained
    assert not torch.equal(student.eval()(layout.input_ids).logits, alone.model(layout.input_ids).logits)


def separate(loaded, place):
    """The same teacher, loaded by itself."""
    from opd.model_loading import _dtype
    from opd.models import load_model

    config = loaded.config
    dtype = _dtype(config.model.teacher, config, is_frozen=True)
    path = str(place / "student")
    model = freeze(load_model(config.model.teacher, path, "key", dtype=dtype, hardware=config.hardware))
    return LocalTeacher(model, vocab_size=loaded.texts.vocabulary.size)


@pytest.mark.parametrize(
    "words",
    [(), (LORA, "model.teacher.dtype=bfloat16"), (LORA, "model.student.quantization=8bit")],
    ids=["no adapter", "another dtype", "other weights"],
)
def test_a_teacher_that_is_not_the_very_base_is_a_model_of_its_own(load, words):
    if "8bit" in str(words):
        pytest.importorskip("bitsandbytes")
    loaded = load(*words, teacher="student")
    assert not isinstance(loaded.teachers["teacher"].model, WithoutAdapter)
    shared = {p.data_ptr() for p in loaded.student.parameters()} & {
        p.data_ptr() for p in loaded.teachers["teacher"].model.parameters() if p.data_ptr()
    }
    assert not shared or "no adapter" in str(words)


def test_rollouts_keep_their_cache_under_gradient_checkpointing(load):
    """Every token is computed once: the prompt's in the first forward, then one a forward."""
    loaded = load("model.student.gradient_checkpointing=true")
    model, seen = causal_lm(loaded.student).train(), []
    hook = model.base_model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    prompts = [loaded.texts.data.train[i].prompt_ids for i in range(3)]
    addresses = [(0, "test", row) for row in range(3)]
    answers = sample(model, prompts, addresses=addresses, sampling=Sampling(8), vocabulary=loaded.texts.vocabulary)
    hook.remove()
    longest = max(len(answer.ids) for answer in answers)
    assert longest > 2
    assert seen == [max(map(len, prompts)), *[1] * (longest - 1)]
    assert model.is_activation_checkpointing and model.training


@pytest.mark.parametrize("words", [(), (LORA,), (BF16, LORA)], ids=" ".join)
def test_gradient_checkpointing_changes_memory_and_no_gradient(load, words):
    found = []
    for asked in ("false", "true"):
        loaded = load(*words, f"model.student.gradient_checkpointing={asked}")
        model, calls = loaded.student.train(), []
        layers = causal_lm(model).base_model.layers
        hook = layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        layout = layout_of(loaded)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BF16 in words):
            loss = model(input_ids=layout.input_ids, labels=layout.input_ids).loss
        loss.backward()
        hook.remove()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), trained, len(calls)))
    (loss, gradients, once), (loss_again, gradients_again, twice) = found
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(loss_again, loss, rtol=0, atol=0)
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def brings_code(place):
    folder = place / "own"
    if not folder.is_dir():
        build_model(folder, "llama", seed=2)
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
        settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "own.py").write_text("open('ran', 'w').close()\n" + CODE)
    return "own"


def test_code_that_a_model_brings_is_not_run_unasked(load, place, brings_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for role in ("student", "teacher"):
        with pytest.raises(ConfigError) as refused:
            load(**{role: brings_code})
        (line,) = str(refused.value).splitlines()
        assert line.startswith(f"model.{role}.path={place / brings_code}: needs Python code that it brings")
        assert line.endswith(f"then set model.{role}.trust_remote_code=true")
    assert not (tmp_path / "ran").exists()


def test_code_that_a_model_brings_runs_when_asked(load, brings_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load("model.student.trust_remote_code=true", student=brings_code)
    assert type(loaded.student).__name__ == "OwnForCausalLM"
    assert (tmp_path / "ran").exists()


def test_adapter_and_merged_model_reload_to_one_model(load, place, tmp_path):
    loaded = load(LORA)
    stir(loaded.student)
    loaded.student.save_pretrained(tmp_path / "final_adapter")
    ids = layout_of(loaded).input_ids
    with torch.no_grad():
        said = loaded.student.eval()(ids).logits
        loaded.student.merge_and_unload().save_pretrained(tmp_path / "final_model")
        for name in ("final_adapter", "final_model"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            torch.testing.assert_close(again(ids).logits, said, rtol=1e-4, atol=1e-5)
