"""Whether the hardware section fits itself and the models: what can be sharded, over how many ranks, with what."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from opd.config import Config, Hardware
from opd.deepspeed_config import deepspeed_config
from opd.errors import ConfigError
from opd.methods import METHODS


def hardware_problems(config: Config) -> list[str]:
    """One line a problem: key, value, remedy."""
    return [*_ranks(config), *_deepspeed(config), *_precision(config), *_quantized(config), *_average(config)]


def _ranks(config: Config) -> list[str]:
    """Nothing can be sharded over one process."""
    hardware = config.hardware
    if hardware.world_size > 1:
        return []
    asked = {"sharding": (hardware.sharding, "ddp"), "teacher_placement": (hardware.teacher_placement, "local")}
    return [
        f"hardware.{key}={value}: hardware={hardware.name} has one process, which has nobody to share with; set it to "
        f"{whole}, or raise hardware.processes_per_node"
        for key, (value, whole) in asked.items()
        if value not in (whole, "cpu_offload")
    ]


def _deepspeed(config: Config) -> list[str]:
    hardware, problems = config.hardware, []
    asked = {"sharding": hardware.sharding, "teacher_placement": hardware.teacher_placement}
    zero = [f"hardware.{key}={value}" for key, value in asked.items() if value.startswith("zero")]
    if zero and find_spec("deepspeed") is None:
        problems.append(f"{zero[0]}: needs deepspeed, not installed here; pip install 'opd[deepspeed]', or use fsdp2")
    if zero and hardware.device == "mps":
        problems.append(f"{zero[0]}: deepspeed knows no mps; set it to {'ddp' if 'sharding' in zero[0] else 'local'}")
    if hardware.deepspeed is not None:
        setting = f"hardware.deepspeed={hardware.deepspeed}"
        if not hardware.sharding.startswith("zero"):
            problems.append(f"{setting}: hardware.sharding={hardware.sharding} does not read it; set it to null")
        elif not Path(hardware.deepspeed).is_file():
            problems.append(f"{setting}: no such file (looked from {Path.cwd()}); give a DeepSpeed JSON, or null")
        else:
            problems += _told(hardware)
    return problems


def _told(hardware: Hardware) -> list[str]:
    """What is wrong with the JSON."""
    try:
        deepspeed_config(hardware)
    except ConfigError as error:
        return [str(error)]
    return []


def _average(config: Config) -> list[str]:
    """An average of the student's weights takes their place, which stage 3 does not let it."""
    needs = METHODS[config.method.name](config.method).needs.teachers.items()
    return [
        f"hardware.sharding=zero3: {name} of method={config.method.name} is an average of the student's weights (ema), "
        "which ZeRO-3 cannot put in their place; use fsdp2 or zero2"
        for name, need in needs
        if need.model == "ema" and config.hardware.sharding == "zero3"
    ]


def _precision(config: Config) -> list[str]:
    hardware = config.hardware
    if hardware.precision != "fp16" or hardware.sharding == "ddp":
        return []
    return [
        f"hardware.precision=fp16: hardware.sharding={hardware.sharding} scales no loss over ranks; set it to bf16, or "
        "hardware.sharding to ddp"
    ]


def _quantized(config: Config) -> list[str]:
    """Packed weights cannot be cut into shards."""
    hardware, models = config.hardware, config.model
    problems = []
    if models.student.quantization is not None and hardware.sharding in ("zero3", "fsdp2"):
        problems.append(
            f"hardware.sharding={hardware.sharding}: cannot shard quantized weights (model.student.quantization="
            f"{models.student.quantization}); set it to ddp, or the quantization to null"
        )
    if models.teacher.quantization is not None and hardware.teacher_placement != "local":
        problems.append(
            f"hardware.teacher_placement={hardware.teacher_placement}: cannot move quantized weights about "
            f"(model.teacher.quantization={models.teacher.quantization}); set it to local, or the quantization to null"
        )
    return problems
