"""hardware=…: what a preset says, what "auto" becomes, and what an out-of-memory is told."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from contract.variants import ROOT, compose, run_alone
from opd.conditions import validated
from opd.devices import with_device
from opd.memory_advice import advice

CARDS = {  # CUDA there, bf16 of its own, MPS there -> device, precision
    "an A800": ((True, True, False), ("cuda", "bf16")),
    "a card from before bf16": ((True, False, False), ("cuda", "fp16")),
    "Apple's": ((False, False, True), ("mps", "fp32")),
    "neither": ((False, False, False), ("cpu", "fp32")),
}


@pytest.fixture
def machine(monkeypatch):
    """Makes torch see a machine that is not this one."""

    def see(cuda, bf16, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return see


@pytest.mark.parametrize("card", CARDS)
def test_a_laptop_computes_on_what_it_has(card, machine):
    there, expected = CARDS[card]
    machine(*there)
    hardware = validated(with_device(compose("hardware=laptop"))).hardware
    assert (hardware.device, hardware.precision) == expected


def test_the_precision_follows_a_device_that_is_named(machine):
    machine(True, True, False)
    found = with_device(compose("hardware=laptop", "hardware.device=cpu"))["hardware"]
    assert (found["device"], found["precision"]) == ("cpu", "fp32")
    found = with_device(compose("hardware=gpu", "hardware.precision=auto"))["hardware"]
    assert (found["device"], found["precision"]) == ("cuda", "bf16")


def test_a_stage_that_asks_for_auto_gets_it_for_the_runs_device(machine):
    machine(True, False, False)
    raw = {"hardware": {"device": "auto", "precision": "fp32"}, "stages": {"one": {"hardware": {"precision": "auto"}}}}
    assert with_device(raw)["stages"]["one"]["hardware"] == {"precision": "fp16"}
    assert raw["hardware"]["device"] == "auto"


def test_a_config_that_names_its_device_is_not_asked_with_torch():
    program = (
        "import sys\nfrom opd.devices import with_device\n"
        "with_device({'hardware': {'device': 'cpu', 'precision': 'fp32'}, 'stages': {}})\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(("preset", "a_node"), [("a800x2", 2), ("a800x4", 4), ("h100x8", 8)])
def test_nodes_of_a_machine_are_a_key(preset, a_node):
    hardware = validated(compose(f"hardware={preset}", "hardware.nodes=4")).hardware
    assert hardware.world_size == 4 * a_node
    assert (hardware.sharding, hardware.teacher_placement) == ("ddp", "local")


def suggested(*words):
    """The keys that the advice names, in its order."""
    return re.findall(r"^  \d+\. ([\w./]+)=", advice(validated(run_alone(compose(*words)))), re.MULTILINE)


PAIR = ["model/student=qwen3_8b", "model/teacher=qwen3_32b", "data=tulu3"]


def test_advice_begins_with_what_leaves_the_result_as_it_is(monkeypatch):
    monkeypatch.setattr("opd.memory_advice.find_spec", lambda name: None)
    assert suggested(
        "method=reverse_kl",
        *PAIR,
        "hardware=a800x2",
        "data.eval_prompts=8",
        "model.student.gradient_checkpointing=false",
    ) == [
        "train.micro_batch_size",
        "model.student.gradient_checkpointing",
        "rollout.batch_size",
        "evaluation.batch_size",
        "hardware.teacher_placement",
        "hardware.teacher_placement",
        "hardware.sharding",
        "model.teacher.quantization",
        "model/adapter",
        "rollout.max_completion_tokens",
        "data.max_prompt_length",
    ]


def test_advice_leaves_out_what_is_done_already():
    done = ["train.micro_batch_size=1", "model.student.gradient_checkpointing=true", "rollout.batch_size=1"]
    done += ["data.eval_prompts=0", "hardware.teacher_placement=cpu_offload", "hardware.sharding=fsdp2"]
    found = suggested("method=reverse_kl", *PAIR, "hardware=a800x2", "model/adapter=lora", *done)
    assert found == ["rollout.max_completion_tokens", "data.max_prompt_length"]


def test_one_process_is_not_told_to_share():
    text = advice(validated(compose("method=reverse_kl", *PAIR, "hardware=gpu")))
    assert "hardware.sharding" not in text and "fsdp2" not in text
    assert "hardware.teacher_placement=cpu_offload (now local)" in text


def test_a_teacher_that_cannot_be_moved_or_is_not_there_gets_no_advice():
    packed = suggested("method=gkd", *PAIR, "hardware=a800x2", "model.teacher.quantization=8bit")
    alone = suggested("method=sft", "model/student=qwen3_8b", "model/teacher=none", "data=tulu3", "hardware=a800x2")
    for found in (packed, alone):
        assert "hardware.teacher_placement" not in found and "model.teacher.quantization" not in found
        assert "hardware.sharding" in found


def test_a_method_that_samples_nothing_is_not_told_to_sample_less():
    pairs = ["method=dpo", "data=dpo_mix_7k", "model/student=qwen3_8b", "model/teacher=none", "hardware=gpu"]
    found = suggested(*pairs)
    assert "rollout.batch_size" not in found and "rollout.max_completion_tokens" not in found
    assert "method.precompute_reference" in found
    assert found.index("method.precompute_reference") < found.index("model/adapter")
    assert "train.micro_batch_size" in found  # 4 sequences are two pairs
    assert "train.micro_batch_size" not in suggested(*pairs, "train.micro_batch_size=2")
    assert "method.precompute_reference" not in suggested(*pairs, "method.reference_free=true")


def test_advice_says_that_the_batch_is_not_what_lies_in_memory():
    text = advice(validated(compose("method=reverse_kl", *PAIR, "hardware=a800x2", "rollout.group_size=4")))
    assert "Not rollout.group_size=4 and train.batch_size=256: train.micro_batch_size says" in text


def test_every_suggestion_is_accepted_by_the_command():
    words = ["method=reverse_kl", *PAIR, "hardware=a800x2"]
    text = advice(validated(compose(*words)))
    settings = [f"{key}={value}" for key, value in re.findall(r"^  \d+\. (\S+)=(\S+) \(now", text, re.MULTILINE)]
    assert len(settings) >= 9
    for setting in settings:
        key, _, values = setting.partition("=")
        for value in values.split("|"):
            validated(compose(*words, f"{key}={value}"))
