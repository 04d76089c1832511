"""The run's models: the student ready to train, teachers that are frozen, each in its dtype and on its device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from opd import distributed, zero
from opd.config import Config, Model
from opd.errors import ConfigError
from opd.models import (
    add_lora,
    attach_objective,
    causal_lm,
    check_head,
    check_packing,
    computing,
    disable_dropout,
    freeze,
    load_model,
    load_student,
    save_memory,
)
from opd.offload import offload
from opd.protocols import Method
from opd.quantization import is_quantized
from opd.sharding import shard
from opd.teachers import LocalTeacher, SelfTeacher, Teacher, WithoutAdapter
from opd.tokenizers import Vocabulary, base_of_adapter


def load_trained_student(config: Config, method: Method) -> Any:
    """The student on its device, ready to be trained."""
    student, key = config.model.student, "model.student.path"
    assert student.path is not None
    model: Any = load_student(student, student.path, dtype=student_dtype(config), hardware=config.hardware)
    model = model.to(device_of(config))
    # Exact where it can be: flash attention alone has no kernel for the float32 weights that autocast computes with.
    with computing(config.hardware) if student.attention == "flash_attention_2" else nullcontext():
        check_head(causal_lm(model), key)
        if config.train.packing:
            check_packing(causal_lm(model), key)
    if not method.needs.student_dropout:
        disable_dropout(model)
    if student.gradient_checkpointing:
        save_memory(model)
    if student.lora is not None and not hasattr(model, "peft_config"):
        torch.manual_seed(config.run.seed)
        model = add_lora(model, student.lora).to(device_of(config))
    if config.trains and is_quantized(causal_lm(model)) and not hasattr(model, "peft_config"):
        setting = f"{key}={student.path}"
        raise ConfigError(f"{setting}: its weights are quantized, which cannot be trained; add model/adapter=lora")
    return model


def shard_student(config: Config, student: Any, teachers: Iterable[Teacher]) -> None:
    """hardware.sharding=fsdp2, in place, once everything has its copy of the whole student; Trainer begins ZeRO."""
    if config.hardware.sharding != "fsdp2":
        return
    setting = "hardware.sharding=fsdp2"
    shard(student, setting, hardware=config.hardware)
    for teacher in teachers:
        if isinstance(teacher, SelfTeacher):
            teacher.follow(setting)


def load_local_teacher(config: Config, path: str, key: str, vocabulary: Vocabulary, student: Any) -> LocalTeacher:
    """The teacher at `path`, placed; without a second copy where it is what the student's adapter lies on.

    Then it lies as the student does, whatever hardware.teacher_placement says.
    """
    settings = config.model.teacher
    if hasattr(student, "peft_config") and _is_students_base(config, path):
        return LocalTeacher(WithoutAdapter(student), vocab_size=vocabulary.size, top_k=settings.top_k)
    dtype = _dtype(settings, config, is_frozen=True)
    model: Any = freeze(load_model(settings, path, key, dtype=dtype, hardware=config.hardware))
    place_teacher(model, config)
    check_head(model, key)
    if config.train.packing:
        check_packing(model, key)
    return LocalTeacher(model, vocab_size=vocabulary.size, top_k=settings.top_k)


def place_teacher(model: Any, config: Config) -> None:
    """hardware.teacher_placement, of a model in main memory: what is sharded is never whole on a device."""
    hardware = config.hardware
    setting = f"hardware.teacher_placement={hardware.teacher_placement}"
    if hardware.teacher_placement == "local":
        model.to(device_of(config))
    elif hardware.teacher_placement == "cpu_offload":
        offload(model, setting, device=device_of(config))
    else:
        attach_objective(model)  # before its forward is wrapped
        if hardware.teacher_placement == "fsdp2":
            shard(model, setting, hardware=hardware, trained=False)
        else:
            zero.join(hardware)
            zero.shard_for_inference(model)


def _is_students_base(config: Config, path: str) -> bool:
    """Whether that folder or hub id is, loaded as a teacher, the very model that the student's adapter lies on."""
    student, teacher = config.model.student, config.model.teacher
    key = "model.student.path"
    base = base_of_adapter(str(student.path), key) or str(student.path)
    loaded_alike = all(
        getattr(student, name) == getattr(teacher, name)
        for name in ("revision", "quantization", "attention", "trust_remote_code")
    )
    same_dtype = student_dtype(config) == _dtype(teacher, config, is_frozen=True)
    return loaded_alike and same_dtype and _place(base) == _place(path)


def _place(path: str) -> str:
    """One name for a folder however it is written; a hub id is its own."""
    folder = Path(path)
    return str(folder.resolve()) if folder.is_dir() else path


def student_dtype(config: Config) -> torch.dtype:
    """Of the student's weights, as they are loaded."""
    student = config.model.student
    adapted = student.lora is not None or base_of_adapter(str(student.path), "model.student.path") is not None
    return _dtype(student, config, is_frozen=adapted)


def _dtype(model: Model, config: Config, *, is_frozen: bool) -> torch.dtype:
    """Of the weights. "auto": frozen ones lie in bfloat16 where that is computed in; trained ones are float32."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if is_frozen and config.hardware.precision == "bf16" else torch.float32


def device_of(config: Config) -> torch.device:
    """This rank's device."""
    kind = config.hardware.device
    return torch.device(kind, distributed.local_rank()) if kind == "cuda" else torch.device(kind)
