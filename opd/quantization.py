"""Frozen weights of 8 or 4 bits (bitsandbytes), and the way back to whole ones."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


def quantization_config(bits: Literal["8bit", "4bit"], *, compute: torch.dtype) -> BitsAndBytesConfig:
    """What from_pretrained asks of bitsandbytes: int8 (Dettmers et al. 2022), or nf4 (2023) that computes in `compute`.

    The output head and what is tied to it stay as they are.
    """
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its weights are, by `quantization_config` or as they lay in the folder."""
    return bool(getattr(model, "is_quantized", False))


def keep_differentiable(model: nn.Module) -> None:
    """Forbid 4-bit layers to repack their weights for a CPU kernel that has no gradient.

    They do so at the first forward in evaluation mode, which here is a rollout: training goes on, without an error in
    models without biases, and most adapters no longer learn.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  no attribute that torch's Module declares


def dequantized(student: Any) -> PreTrainedModel:
    """The base of a student with an adapter, whole weights again: those that the adapter was trained on.

    Merging into quantized weights would round the adapter away, and the weights before quantization are not what was
    trained and evaluated. The student is taken apart.
    """
    base = student.unload()
    turned = [
        name for name, layer in base.named_modules() if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
    ]
    base.dequantize(dtype=base.get_output_embeddings().weight.dtype)
    base._weight_conversions = None  # save_pretrained would undo how they were loaded, which quantized weights cannot
    for name in turned:  # GPT-2's layers keep their weights the other way round, and were turned to be quantized
        linear = base.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
        base.set_submodule(name, layer)
    return base
