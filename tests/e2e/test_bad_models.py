"""Models, tokenizers, templates and devices that cannot be used are refused in one line, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from e2e.bad_input import Case, Place, is_refused
from e2e.model_folders import CHATML, build_model, build_tokenizer


def _same_tokens_other_ids(place):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = json.loads(build_tokenizer().backend_tokenizer.to_str())
    ids = model["model"]["vocab"]
    ids["!"], ids["a"] = ids["a"], ids["!"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)), eos_token="<|im_end|>", chat_template=CHATML
    )
    place.teacher = build_model(place.folder / "teacher", tokenizer=swapped)
    return (), ("model.teacher.path=", "not the student's: 2 tokens differ", "choose a teacher of the same family")


def _same_size_other_tokens(place):
    place.teacher = build_model(place.folder / "teacher", tokenizer=build_tokenizer(reverse=True))
    return (), ("model.teacher.path=", "is not the student's", "choose a teacher of the same family")


def _no_tokenizer(place):
    for file in place.copy_student().glob("*token*"):
        file.unlink()
    return (), ("model.student.path=", "no tokenizer lies there", "give a complete folder")


def _broken_tokenizer(place):
    (place.copy_student() / "tokenizer.json").write_text("{")
    return (), ("model.student.path=", "no tokenizer loads from it", "give a complete folder")


def _no_eos(place):
    file = place.copy_student() / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    (place.student / "generation_config.json").unlink()
    return (), ("model.student.path=", "has no eos token", "set eos_token")


def _no_config_json(place):
    (place.copy_student() / "config.json").unlink()
    return (), ("model.student.path=", "not a model folder (no config.json)", "save_pretrained")


def _unknown_model_type(place):
    (place.copy_student() / "config.json").write_text('{"model_type": "frobnicate"}')
    return (), ("model.student.path=", "no model that transformers knows", "`frobnicate`", "upgrade transformers")


def _not_a_language_model(place):
    (place.copy_student() / "config.json").write_text('{"model_type": "clip"}')
    return (), ("model.student.path=", "its weights do not load", "CLIPConfig", "give a complete folder")


def _no_weights(place):
    (place.copy_student() / "model.safetensors").unlink()
    return (), ("model.student.path=", "its weights do not load", "model.safetensors", "give a complete folder")


def _truncated_weights(place):
    file = place.copy_student() / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return (), ("model.student.path=", "its weights do not load", "not fully covered", "give a complete folder")


def _a_weight_left_out(place):
    from safetensors.torch import load_file, save_file

    file = place.copy_student() / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    return (), ("model.student.path=", "1 weights are not in it, e.g. model.layers.1.mlp.up_proj.weight", "complete")


def _other_shapes(place):
    file = place.copy_student() / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 32}))
    return (), ("model.student.path=", "its weights do not load", "give a complete folder")


def _no_chat_template_file(place):
    return ("model.student.chat_template=no.jinja",), ("model.student.chat_template=no.jinja: no such file", "name a")


def _broken_chat_template(place):
    file = place.write("bad.jinja", "{% for x %}")
    return (f"model.student.chat_template={file}",), ("model.student.chat_template=", "not a Jinja template", "mend it")


def _attention_that_is_not_there(place):
    return ("model.student.attention=flash_attention_2",), (
        "model.student.attention=flash_attention_2: has no kernel for hardware.device=cpu",
        "set it to sdpa",
    )


def _lora_targets_that_are_not_there(place):
    lora = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:[nope]}"
    return (lora,), ("model.student.lora.targets=['nope']: does not fit this model", "use all-linear")


def _devices_that_are_not_there(place):
    import torch

    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has them")
    return ("hardware=a800x2", "train.batch_size=4"), ("hardware=a800x2: needs 2 CUDA devices", "use hardware=cpu_tiny")


def _no_metal(place):
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    return ("hardware.device=mps",), ("hardware.device=mps: this machine has none", "use hardware.device=cpu")


LORA = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:all-linear}"
NO_NETWORK = ("hub id is not in the cache", "HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE, or give a folder")


def _student_of_the_hub_without_a_network(place: Place) -> Case:
    place.student = Path("nobody/nothing")
    return (), ("model.student.path=nobody/nothing: no such folder", *NO_NETWORK)


def _teacher_of_the_hub_without_a_network(place: Place) -> Case:
    place.teacher = Path("nobody/nothing")
    return (), ("model.teacher.path=nobody/nothing: no such folder", *NO_NETWORK)


def _revision_without_a_network(place: Place) -> Case:
    place.student = Path("nobody/nothing")
    return ("model.student.revision=v2",), ("model.student.path=nobody/nothing", "not in the cache (revision v2)")


def _preset_without_a_network(place: Place) -> Case:
    place.student = Path("nobody/Qwen3-0.1B")
    return ("model/student=qwen3_1_7b",), ("model.student.path=nobody/Qwen3-0.1B: no such folder", *NO_NETWORK)


def _code_that_the_model_brings(place: Place) -> Case:
    place.copy_student()
    place.edit("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    place.edit("tokenizer_config.json", tokenizer_class=None)
    (place.student / "mine.py").write_text("raise SystemExit(7)")
    return (), ("model.student.path=", "needs Python code that it brings", "set model.student.trust_remote_code=true")


def _code_of_the_model_that_breaks(place: Place) -> Case:
    _code_that_the_model_brings(place)
    (place.student / "mine.py").write_text("import a_module_that_nobody_has")
    return ("model.student.trust_remote_code=true",), ("model.student.path=", "a_module_that_nobody_has")


def _thinking_without_a_thinking_mode(place: Place) -> Case:
    parts = ("model.student.thinking=true: the chat template of", "knows no enable_thinking", "set it to null")
    return ("model.student.thinking=true",), parts


def _packaged_template_misspelt(place: Place) -> Case:
    parts = ("model.student.chat_template=chatlm: no such file", "one of training, chatml, zephyr")
    return ("model.student.chat_template=chatlm",), parts


def _training_template_of_an_unknown_family(place: Place) -> Case:
    parts = ("model.student.chat_template=training: TRL has no training template", "name a file")
    return ("model.student.chat_template=training",), parts


def _training_template_without_a_template(place: Place) -> Case:
    (place.copy_student() / "chat_template.jinja").unlink()
    parts = ("model.student.chat_template=training:", "has no chat template", "or one of chatml, zephyr")
    return ("model.student.chat_template=training",), parts


def _template_that_refuses_a_user(place: Place) -> Case:
    file = place.write("bad.jinja", "{{ raise_exception('not today') }}")
    return (f"model.student.chat_template={file}",), ("bad.jinja: cannot render a user's message (not today)", "mend")


def _template_that_is_no_text(place: Place) -> Case:
    file = place.folder / "bad.jinja"
    file.write_bytes(b"\xff\xfe{{")
    return (f"model.student.chat_template={file}",), ("bad.jinja: cannot be read as UTF-8 text", "mend the file")


def _template_that_changes_a_finished_turn(place: Place) -> Case:
    moved = CHATML.replace("{% for", "{{ messages | length }}{% for", 1)
    file = place.write("bad.jinja", moved)
    return (f"model.student.chat_template={file}", "method=sft"), (
        "row 1: the chat template is not prefix-stable",
        "set",
    )


def _adapter(place: Place, **settings: object) -> Path:
    """An adapter of the student in the student's place."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, place.student = place.student, place.folder / "adapter"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(place.student)
    AutoTokenizer.from_pretrained(base).save_pretrained(place.student)
    place.edit("adapter_config.json", **settings)
    return place.student


def _adapter_whose_base_is_gone(place: Place) -> Case:
    _adapter(place, base_model_name_or_path="/nonexistent/base")
    return (), (
        "model.student.path=",
        "an adapter whose base model /nonexistent/base is not there",
        "base_model_name_or_path",
    )


def _adapter_of_the_hub_without_a_network(place: Place) -> Case:
    _adapter(place, base_model_name_or_path="nobody/nothing")
    return (), ("model.student.path=", "adapter (an adapter of nobody/nothing): no such folder", *NO_NETWORK)


def _adapter_without_a_base(place: Place) -> Case:
    _adapter(place, base_model_name_or_path=None)
    return (), ("model.student.path=", "an adapter that does not name its base model", "merge it into a model")


def _adapter_and_another_adapter(place: Place) -> Case:
    _adapter(place)
    more = (
        "model/adapter=lora",
        "model.student.lora.r=8",
        "model.student.lora.alpha=8",
        "model.student.lora.dropout=0.0",
    )
    return more, ("model.student.lora.r=8: training continues the adapter in", "which has 4", "set model.student.lora")


def _adapter_that_is_no_json(place: Place) -> Case:
    (_adapter(place) / "adapter_config.json").write_text("{")
    return (), ("model.student.path=", "its adapter_config.json is not a JSON object", "give a complete folder")


def _config_that_is_no_json(place: Place) -> Case:
    (place.copy_student() / "config.json").write_text("{")
    return (), ("model.student.path=", "config.json", "give a complete folder")


def _bitsandbytes_missing(place: Place) -> Case:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    parts = ("model.student.quantization=4bit: bitsandbytes is not installed", "pip install 'opd[quantize]'")
    return (LORA, "model.student.quantization=4bit"), parts


def _bitsandbytes_missing_for_the_teacher(place: Place) -> Case:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    parts = ("model.teacher.quantization=8bit: bitsandbytes is not installed", "or set it to null")
    return ("model.teacher.quantization=8bit",), parts


def _tensorboard_missing(place: Place) -> Case:
    sys.modules["tensorboard"] = None  # type: ignore[assignment]
    return ("tracking=tensorboard",), ("tracking=tensorboard: needs tensorboard", "pip install 'opd[tensorboard]'")


def _lm_eval_missing(place: Place) -> Case:
    sys.modules["lm_eval"] = None  # type: ignore[assignment]
    return ("evaluation.lm_eval.tasks=[gsm8k]",), ("evaluation.lm_eval.tasks=['gsm8k']: needs lm-eval", "'opd[eval]'")


def _task_that_is_no_task(place: Place) -> Case:
    pytest.importorskip("lm_eval")
    file = place.write("task.yaml", "just: words")
    return (f"evaluation.lm_eval.tasks=[{file}]",), ("evaluation.lm_eval.tasks=", "task.yaml: cannot be loaded", "mend")


def _lora_on_the_head(place: Place) -> Case:
    lora = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:[lm_head]}"
    return (lora,), ("model.student.lora.targets=['lm_head']: names the output head", "use all-linear")


def _kept_quantized_and_trained_whole(place: Place) -> Case:
    return ("model.student.quantization=8bit",), ("model.student.quantization=8bit:", "add model/adapter=lora")


def _a_sequence_beyond_its_positions(place: Place) -> Case:
    return ("rollout.max_completion_tokens=120",), ("model.student.path: it has 128 positions", "lower data.max_prompt")


def _pickled_weights(place: Place) -> Case:
    (place.copy_student() / "model.safetensors").unlink()
    (place.student / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    return (), (
        "model.student.path=",
        "its weights do not load (not a checkpoint of tensors)",
        "give a complete folder",
    )


def _a_shard_is_missing(place: Place) -> Case:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.copy_student())
    (place.student / "model.safetensors").unlink()
    model.save_pretrained(place.student, max_shard_size="20KB")
    sorted(place.student.glob("model-*.safetensors"))[-1].unlink()
    return (), ("model.student.path=", "its weights do not load", "give a complete folder")


BEFORE_A_WEIGHT = [
    _same_tokens_other_ids,
    _same_size_other_tokens,
    _no_tokenizer,
    _broken_tokenizer,
    _no_eos,
    _no_config_json,
    _unknown_model_type,
    _no_chat_template_file,
    _broken_chat_template,
    _attention_that_is_not_there,
    _devices_that_are_not_there,
    _no_metal,
    _student_of_the_hub_without_a_network,
    _teacher_of_the_hub_without_a_network,
    _revision_without_a_network,
    _preset_without_a_network,
    _code_that_the_model_brings,
    _code_of_the_model_that_breaks,
    _thinking_without_a_thinking_mode,
    _packaged_template_misspelt,
    _training_template_of_an_unknown_family,
    _training_template_without_a_template,
    _template_that_refuses_a_user,
    _template_that_is_no_text,
    _template_that_changes_a_finished_turn,
    _adapter_whose_base_is_gone,
    _adapter_of_the_hub_without_a_network,
    _adapter_without_a_base,
    _adapter_and_another_adapter,
    _adapter_that_is_no_json,
    _config_that_is_no_json,
    _bitsandbytes_missing,
    _bitsandbytes_missing_for_the_teacher,
    _tensorboard_missing,
    _lm_eval_missing,
    _task_that_is_no_task,
    _kept_quantized_and_trained_whole,
    _a_sequence_beyond_its_positions,
]
WITH_THE_WEIGHTS = [
    _not_a_language_model,
    _no_weights,
    _truncated_weights,
    _a_weight_left_out,
    _other_shapes,
    _lora_targets_that_are_not_there,
    _lora_on_the_head,
    _pickled_weights,
    _a_shard_is_missing,
]


@pytest.fixture
def modules():
    """Modules that a case takes away come back."""
    before = dict(sys.modules)
    yield
    for name in [name for name, module in sys.modules.items() if module is None and before.get(name, 0) is not None]:
        del sys.modules[name]
        sys.modules |= {name: before[name]} if name in before else {}


@pytest.mark.parametrize("broken", BEFORE_A_WEIGHT, ids=lambda case: case.__name__.strip("_"))
def test_what_small_files_tell_is_refused_before_a_weight_is_loaded(place, broken, monkeypatch, modules):
    more, parts = broken(place)
    monkeypatch.setattr("opd.pipeline.load_trained_student", lambda *_: pytest.fail("weights were loaded"))
    is_refused(place, more, parts)


@pytest.mark.parametrize("broken", WITH_THE_WEIGHTS, ids=lambda case: case.__name__.strip("_"))
def test_weights_that_do_not_load_are_refused_before_the_run_has_a_folder(place, broken):
    more, parts = broken(place)
    is_refused(place, more, parts)
