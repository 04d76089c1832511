"""Whether the models can be loaded and computed with as the config asks: installed, on this device, in this dtype."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from opd.config import Config, Model
from opd.data.templates import TRAINING, template_file
from opd.errors import ConfigError


def loading_problems(config: Config) -> list[str]:
    """What stands against it, one line each."""
    models: dict[str, Model] = {"model.student": config.model.student}
    if config.model.teacher.exists:
        models["model.teacher"] = config.model.teacher
    problems = [line for key, model in models.items() for line in _quantization(key, model)]
    problems += [line for key, model in models.items() for line in _flash_attention(config, key, model)]
    problems += [line for key, model in models.items() for line in _chat_template(key, model)]
    return problems + _frozen(config)


def _quantization(key: str, model: Model) -> list[str]:
    if model.quantization is None or find_spec("bitsandbytes") is not None:
        return []
    setting = f"{key}.quantization={model.quantization}"
    return [f"{setting}: bitsandbytes is not installed; pip install 'opd[quantize]', or set it to null"]


def _chat_template(key: str, model: Model) -> list[str]:
    if model.chat_template in (None, TRAINING):
        return []
    try:
        template_file(model.chat_template, f"{key}.")
    except ConfigError as error:
        return [str(error)]
    return []


def _frozen(config: Config) -> list[str]:
    """Quantized weights cannot be trained: an adapter on them can."""
    student = config.model.student
    adapter = Path(student.path or "") / "adapter_config.json"
    if student.quantization is None or student.lora is not None or not config.trains or adapter.is_file():
        return []
    setting = f"model.student.quantization={student.quantization}"
    return [f"{setting}: quantized weights cannot be trained; add model/adapter=lora, or set it to null"]


def _flash_attention(config: Config, key: str, model: Model) -> list[str]:
    if model.attention != "flash_attention_2":
        return []
    setting, hardware = f"{key}.attention=flash_attention_2", config.hardware
    if hardware.device != "cuda":
        return [f"{setting}: has no kernel for hardware.device={hardware.device}; set it to sdpa"]
    if find_spec("flash_attn") is None and find_spec("kernels") is None:
        return [f"{setting}: flash-attn is not installed; pip install flash-attn, or set it to sdpa"]
    # A student with float32 weights computes under autocast; a teacher in its own dtype, which auto halves for bf16.
    halved = ("bf16", "fp16") if key == "model.student" else ("bf16",) if model.dtype == "auto" else ()
    if model.dtype in ("bfloat16", "float16") or hardware.precision in halved:
        return []
    asked = f"{key}.dtype={model.dtype} with hardware.precision={hardware.precision}"
    return [f"{setting}: has no kernel for the float32 of {asked}; set {key}.dtype=bfloat16, or attention to sdpa"]
