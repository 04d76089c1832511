"""Frozen 8-bit and 4-bit weights: adapters on them learn as if no rollout came between, and merge into whole weights."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.tiny import VOCABULARY, make_model
from transformers import AutoModelForCausalLM

from opd.config import Hardware, LoRA, Model
from opd.models import add_lora, causal_lm, check_head, check_packing, load_model, merged
from opd.quantization import is_quantized
from opd.sources import Sampling, sample

pytest.importorskip("bitsandbytes")

BITS = ("8bit", "4bit")
# Wide enough for the kernel that a 4-bit layer would repack its weights for.
SHAPES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "n_inner": 128},
}
IDS = torch.tensor([[3, 9, 12, 5, 7, 20, 31, 8], [14, 2, 40, 11, 6, 33, 21, 4]])


def settings(bits, **more):
    return Model(path="x", dtype="auto", attention="sdpa", trust_remote_code=False, quantization=bits, **more)


def hardware(precision="fp32"):
    return Hardware(name="test", device="cpu", nodes=1, processes_per_node=1, precision=precision, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for kind, shape in SHAPES.items():
        make_model(kind, seed=1, **shape).save_pretrained(place / kind)
    return place


def load(folder, kind, bits, dtype=torch.float32):
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return load_model(settings(bits), str(folder / kind), "key", dtype=dtype, hardware=hardware(precision))


def adapted(folder, kind, bits, dtype=torch.float32):
    model = load(folder, kind, bits, dtype)
    torch.manual_seed(0)
    return add_lora(model, LoRA(r=4, alpha=8, dropout=0.0, targets="all-linear"))


def learn(student, *, rollouts, steps=4):
    """Losses of a few steps, and how many adapter matrices had a gradient in the second."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses, reached = [], 0
    for step in range(steps):
        if rollouts:
            rollout(student)
        student.train()
        loss = student(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            reached = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    return losses, reached, len(trained)


def rollout(student):
    addresses = [(0, "test", row) for row in range(2)]
    return sample(student, IDS.tolist(), addresses=addresses, sampling=Sampling(5), vocabulary=VOCABULARY)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_losses_with_a_rollout_before_every_step_are_those_without(folder, kind, bits):
    with_rollouts, reached, trained = learn(adapted(folder, kind, bits), rollouts=True)
    without, *_ = learn(adapted(folder, kind, bits), rollouts=False)
    assert with_rollouts == without
    assert reached == trained
    assert without[-1] < 0.99 * without[0]


def test_a_repacked_layer_would_leave_adapters_without_a_gradient(folder):
    """What the test above would find, had the repacking not been forbidden."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("only CPUs with AVX512-BF16 repack")
    student = adapted(folder, "llama", "4bit")
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    losses, reached, trained = learn(student, rollouts=True)
    assert reached < trained
    assert losses != learn(adapted(folder, "llama", "4bit"), rollouts=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_is_near_the_whole_one_and_passes_the_checks(folder, kind, bits, dtype):
    model = load(folder, kind, bits, dtype)
    assert is_quantized(model)
    check_head(model, "key")
    check_packing(model, "key")
    whole = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    assert not is_quantized(whole)
    assert model.get_memory_footprint() < 0.7 * whole.get_memory_footprint()
    assert model.num_parameters() == whole.num_parameters()
    with torch.no_grad():
        cosine = torch.cosine_similarity(model(IDS).logits.flatten().float(), whole(IDS).logits.flatten(), dim=0)
    assert cosine > (0.999 if bits == "8bit" else 0.9)  # weights are random, so errors do not cancel


@pytest.mark.parametrize("bits", BITS)
def test_a_copy_of_a_quantized_student_is_a_model_of_its_own(folder, bits):
    student = adapted(folder, "llama", bits)
    learn(student, rollouts=True, steps=2)
    kept = copy.deepcopy(student).eval()
    with torch.no_grad():
        before = kept(IDS).logits
        torch.testing.assert_close(before, student.eval()(IDS).logits, rtol=0, atol=0)
    learn(student, rollouts=True, steps=2)
    with torch.no_grad():
        torch.testing.assert_close(kept(IDS).logits, before, rtol=0, atol=0)
        assert not torch.allclose(student.eval()(IDS).logits, before)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_merged_model_is_whole_and_says_what_the_trained_student_said(folder, tmp_path, kind, bits):
    student = adapted(folder, kind, bits)
    learn(student, rollouts=True)
    student.save_pretrained(tmp_path / "adapter")
    student.eval()
    with torch.no_grad():
        said = student(IDS).logits
        with student.disable_adapter():
            untrained = student(IDS).logits
    merged(student, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantized(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(IDS).logits
    # 8-bit layers round what they read too, which no weight can hold.
    scale = (said - untrained).abs().max()
    assert (logits - said).abs().max() < (1e-5 if bits == "4bit" else 0.1) * scale


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_folder_as_a_quantized_teacher_is_not_rounded_away(folder, tmp_path, bits):
    student = adapted(folder, "llama", bits)
    learn(student, rollouts=False)
    student.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").unlink(missing_ok=True)
    path = str(tmp_path / "adapter")
    teacher = load_model(settings(bits), path, "key", dtype=torch.float32, hardware=hardware())
    assert teacher is causal_lm(teacher)
    check_head(teacher, "key")
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(IDS).logits, student.eval()(IDS).logits, rtol=1e-5, atol=1e-6)
