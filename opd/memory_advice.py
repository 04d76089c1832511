"""What to change when a run does not fit: settings that keep the result first, then those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from opd.adapter_folder import adapter_settings
from opd.config import Config
from opd.methods import METHODS
from opd.protocols import Needs


def advice(config: Config) -> str:
    """Numbered lines, the cheapest remedy first; each is key=value, what stands there now, and what it costs.

    Only what this config can still be lowered in: the order is by what is given up, not by how much it saves, which
    depends on where the memory went (docs/launching.md has the sizes).
    """
    needs = METHODS[config.method.name](config.method).needs
    kept, changed = list(_same_result(config, needs)), list(_other_result(config, needs))
    lines = ["out of memory; in this order, the first ones leave the result as it is:"]
    for number, line in enumerate([*kept, *changed], 1):
        if number == len(kept) + 1:
            lines.append("these change the result:")
        lines.append(f"  {number}. {line}")
    if config.trains:
        batch = f"train.batch_size={config.train.batch_size}"
        if needs.rollouts:
            batch = f"rollout.group_size={config.rollout.group_size} and {batch}"
        lines.append(f"Not {batch}: train.micro_batch_size says how many sequences one forward holds, of any batch.")
    if config.mode == "train" and (config.train.save_every_steps or config.train.save_every_epoch):
        there = f"run.resume={config.run.dir}/checkpoint-N"
        lines.append(f"A changed config is a run of its own, with another run.dir; {there} goes on from a checkpoint.")
    return "\n".join(lines)


def _same_result(config: Config, needs: Needs) -> Iterator[str]:
    yield from _batches(config, needs)
    if getattr(config.method, "precompute_reference", None) is False and not getattr(
        config.method, "reference_free", False
    ):
        yield "method.precompute_reference=true (now false): the reference scores before training, and is gone then"
    yield from _teacher_placement(config, needs)
    yield from _sharding(config)


def _batches(config: Config, needs: Needs) -> Iterator[str]:
    """How much one forward holds."""
    train, rollout, evaluation = config.train, config.rollout, config.evaluation
    together = len(needs.sequences)
    if (config.trains or config.mode == "scores") and train.micro_batch_size > together:
        yield (
            f"train.micro_batch_size={together} (now {train.micro_batch_size}): sequences in one forward and backward"
        )
    if config.trains and not config.model.student.gradient_checkpointing:
        yield (
            "model.student.gradient_checkpointing=true (now false): only layers' inputs are kept, the rest is computed "
            "twice"
        )
    if _samples(config, needs) and rollout.batch_size > 1:
        smaller = _quarter(rollout.batch_size)
        yield f"rollout.batch_size={smaller} (now {rollout.batch_size}): sequences sampled together"
    measured = config.data.eval_prompts or evaluation.lm_eval.tasks
    if config.mode in ("train", "check", "eval") and measured and evaluation.batch_size > 1:
        yield (
            f"evaluation.batch_size={_quarter(evaluation.batch_size)} (now {evaluation.batch_size}): sequences sampled "
            "or scored together between the steps"
        )


def _teacher_placement(config: Config, needs: Needs) -> Iterator[str]:
    hardware, teacher = config.hardware, config.model.teacher
    asked = any(not need.is_student for need in needs.asked(config.mode).values())
    if not (asked or (teacher.exists and config.mode == "eval")) or teacher.quantization is not None:
        return
    now = f"(now {hardware.teacher_placement})"
    if hardware.teacher_placement == "local" and hardware.world_size > 1:
        yield (
            f"hardware.teacher_placement={_kinds('fsdp2', 'zero3', hardware.device)} {now}: 1/{hardware.world_size} of "
            "the teacher on each rank"
        )
    if hardware.teacher_placement != "cpu_offload" and hardware.device == "cuda":
        yield f"hardware.teacher_placement=cpu_offload {now}: the teacher in main memory; every score waits for the bus"


def _sharding(config: Config) -> Iterator[str]:
    hardware, student = config.hardware, config.model.student
    if not config.trains or hardware.world_size == 1 or hardware.precision == "fp16":
        return
    now, packed = f"(now {hardware.sharding})", student.quantization is not None
    if hardware.sharding in ("ddp", "zero1") and _has_deepspeed(hardware.device):
        yield f"hardware.sharding=zero2 {now}: 1/{hardware.world_size} of gradients and optimizer state on each rank"
    if hardware.sharding in ("ddp", "zero1", "zero2") and not packed:
        yield (
            f"hardware.sharding={_kinds('fsdp2', 'zero3', hardware.device)} {now}: 1/{hardware.world_size} of the "
            "student's weights too"
        )


def _other_result(config: Config, needs: Needs) -> Iterator[str]:
    student, teacher, data = config.model.student, config.model.teacher, config.data
    if teacher.exists and teacher.quantization is None and config.hardware.teacher_placement == "local":
        yield "model.teacher.quantization=8bit (now null): half of its bytes in bf16; 4bit: a quarter; slower, rounded"
    if config.trains and student.lora is None and not _is_adapter(student.path):
        yield "model/adapter=lora (now none): 2 bytes a frozen weight in bf16, 4 in fp32, instead of 16 a trained one"
    if _samples(config, needs):
        length = config.rollout.max_completion_tokens
        yield f"rollout.max_completion_tokens={max(1, length // 2)} (now {length}): longer answers are cut"
    if config.trains and needs.completions == "required":
        length = data.max_completion_length
        yield f"data.max_completion_length={max(1, length // 2)} (now {length}): longer ones are cut, and counted"
    if data.name != "walk":
        length = data.max_prompt_length
        yield f"data.max_prompt_length={max(1, length // 2)} (now {length}): longer prompts are dropped, and counted"


def _samples(config: Config, needs: Needs) -> bool:
    return (config.trains and needs.rollouts) or config.mode == "responses"


def _is_adapter(path: str | None) -> bool:
    return path is not None and adapter_settings(path, "model.student.path") is not None


def _quarter(size: int) -> int:
    return max(1, size // 4)


def _kinds(own: str, deepspeed: str, device: str) -> str:
    return f"{own}|{deepspeed}" if _has_deepspeed(device) else own


def _has_deepspeed(device: str) -> bool:
    return device != "mps" and find_spec("deepspeed") is not None
