"""What is done to a student in shards (FSDP2) and, by a single process, to a whole one. Each case tells what it found."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from contract.tiny import Told, make_model, make_trainer, some_of_the_step, train
from contract.variants import Variant, per_micro_batch, tiny_config
from preflight.tried import NAMED, find, heeded
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd import distributed
from opd.config import Config, LoRA
from opd.errors import RunError
from opd.models import add_lora, causal_lm, freeze, save_memory
from opd.sharding import gathered, local, parameter_bytes, shard, whole_state
from opd.teachers import asked_unevenly
from opd.trainer import DistillationTrainer


def settings(variant: Variant, world_size: int, folder: Path, **more: Any) -> Config:
    """FSDP2 where there is more than one process; micro-batches that are not the same on one rank and on two.

    SGD: what a parameter-wise optimizer makes of a gradient near 0 is decided by rounding.
    """
    hardware = {"processes_per_node": world_size, "sharding": "fsdp2" if world_size > 1 else "ddp"}
    training = {**per_micro_batch(variant, 3), "optimizer": "sgd", "max_grad_norm": 1.0}
    return tiny_config(
        variant,
        train=training | more.pop("train", {}),
        hardware=hardware | more.pop("hardware", {}),
        run={"dir": str(folder)},
        **more,
    )


def make_student(*, kind: str = "llama", dropout: float | None = None, checkpointing: bool = False) -> Any:
    """Of this family; with an adapter of this dropout."""
    student = make_model(kind, 1)
    if checkpointing:
        save_memory(student)
    if dropout is None:
        return student
    torch.manual_seed(0)
    return add_lora(student, LoRA(r=4, alpha=8, dropout=dropout, targets="all-linear"))


def trained(
    variant: Variant, world_size: int, folder: Path, *, steps: int = 1, student: Any = None, **more: Any
) -> dict:
    """Steps of the variant, on a student with these traits."""
    config = settings(variant, world_size, folder, **more)
    return told_of(train(config, student=make_student(**(student or {})), empties=some_of_the_step, steps=steps))


def told_of(told: Told) -> dict[str, Any]:
    """What trainings are compared in."""
    return {
        "named": told.named,
        "gradients": told.gradients,
        "rollouts": [[sequence.completion_ids for sequence in window.sequences] for window in told.windows],
        "in_shards": {isinstance(parameter, DTensor) for parameter in told.student.parameters()},
        "bytes": parameter_bytes(told.student),
        "weights": whole_state(told.student),
    }


def also_ddp(variant: Variant, world_size: int, folder: Path, **more: Any) -> list[dict[str, Any]]:
    """The same on these ranks, in shards and whole."""
    ddp = {"hardware": {**more.get("hardware", {}), "sharding": "ddp"}}
    return [trained(variant, world_size, folder, **more), trained(variant, world_size, folder, **(more | ddp))]


def resumed(variant: Variant, world_size: int, folder: Path, **student: Any) -> list[dict[str, Any]]:
    """Six steps, and the last three of them again from the checkpoint in the middle, by AdamW."""
    folder = folder / f"resumed-{variant}-{len(student)}"
    saving = {"optimizer": "adamw", "save_every_steps": 3, "keep_checkpoints": 2}
    config = settings(variant, world_size, folder, train=saving)
    told = []
    for checkpoint in (None, folder / "checkpoint-3"):
        torch.manual_seed(7)  # dropout's, until the checkpoint's state is there
        trainer, said = make_trainer(config, student=make_student(**student), steps=6)
        trainer.resume(checkpoint)
        told.append(told_of(said))
    return told


def loads_alone(variant: Variant, world_size: int, folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that transformers loads, of what `trained` tells after as many steps."""
    folder = folder / f"alone-{variant}"
    config = settings(variant, world_size, folder, train={"save_every_steps": 1})
    train(config, student=make_student(), empties=some_of_the_step)
    distributed.barrier()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint-1").state_dict()


def checked(name: str, world_size: int, folder: Path, **more: Any) -> list[str]:
    """What the checks of the gradient say of a healthy run."""
    config = settings(NAMED[name], world_size, folder)
    return heeded(find(name, hardware=config.hardware.model_dump(), run={"dir": str(folder)}, **more))


def checked_upside_down(name: str, world_size: int, folder: Path) -> list[str]:
    """The same where the engine lowers what it should raise: the loss that is told is not the one that is followed."""
    original = DistillationTrainer.compute_loss

    @functools.wraps(original)
    def mistaken(self, *arguments, **keywords):
        loss = original(self, *arguments, **keywords)
        return loss if not torch.is_grad_enabled() else 2 * loss.detach() - loss

    DistillationTrainer.compute_loss = mistaken
    try:
        return checked(name, world_size, folder)
    finally:
        DistillationTrainer.compute_loss = original


def checked_infinite(name: str, world_size: int, folder: Path) -> list[str]:
    """The same where the loss of the last rank alone is not finite."""
    original = DistillationTrainer.compute_loss

    def mistaken(self, *arguments, **keywords):
        loss = original(self, *arguments, **keywords)
        if distributed.rank() == world_size - 1:
            raise RunError("the loss is nan")
        return loss

    DistillationTrainer.compute_loss = mistaken
    try:
        return checked(name, world_size, folder)
    finally:
        DistillationTrainer.compute_loss = original


def gathered_alone(variant: Variant, world_size: int, folder: Path) -> dict[str, Any]:
    """Logits that only the first rank computes, while the weights are whole, and what is whole then and afterwards."""
    _, told = make_trainer(settings(variant, world_size, folder), student=make_student())
    ids = torch.arange(1, 9).view(2, 4)
    inner, logits = causal_lm(told.student), None
    before = parameter_bytes(told.student)
    with gathered(told.student), gathered(told.student), torch.no_grad():
        whole = parameter_bytes(told.student)
        if distributed.rank() == 0:
            logits = [inner(input_ids=ids).logits, inner.lm_head(inner.base_model(input_ids=ids).last_hidden_state)]
    return {"before": before, "whole": whole, "after": parameter_bytes(told.student), "logits": logits}


def asked_while_gathered(variant: Variant, world_size: int, folder: Path) -> list[Tensor]:
    """What a teacher with weights of its own says after a step: between forwards, and to the first rank alone within
    `gathered`, as an evaluation asks it."""
    trainer, told = make_trainer(
        settings(variant, world_size, folder, train={"optimizer": "adamw"}), student=make_student()
    )
    trainer.train()
    name = next(name for name, need in trainer.method.needs.teachers.items() if need.model in ("initial", "ema"))
    teacher = told.teachers[name]
    batch = max(trainer.windows(0).batches, key=lambda batch: len(batch.layout.targets))
    view = batch.views.get(name, batch.layout)
    said = [teacher.logprobs(view, batch.sequences)]
    with gathered(told.student), asked_unevenly([teacher]):
        if distributed.rank() == 0:
            said += [teacher.logprobs(view, batch.sequences) for _ in range(2)]
    said.append(teacher.logprobs(view, batch.sequences))
    return said


def evaluated_unequally(variant: Variant, world_size: int, folder: Path) -> dict[str, Any]:
    """A step after an evaluation in which the first rank alone had rows, and scored them by the backbone."""
    config = settings(variant, world_size, folder)
    trainer, told = make_trainer(config, student=make_student(), empties=some_of_the_step)
    with gathered(told.student), torch.no_grad():
        for _ in range(3 if distributed.rank() == 0 else 0):
            causal_lm(told.student).base_model(input_ids=torch.arange(1, 9).view(2, 4))
    trainer.train()
    return told_of(told)


def noted_forwards(world_size: int, folder: Path) -> list[int]:
    """How many forwards FSDP2 remembers of a frozen model, after each of three."""
    model = freeze(make_model("llama", 3))
    shard(
        model,
        "hardware.teacher_placement=fsdp2",
        hardware=settings(Variant("sft", "defaults"), world_size, folder).hardware,
        trained=False,
    )
    noted = []
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=torch.arange(1, 9).view(2, 4))
        noted.append(len(model._get_fsdp_state()._comm_ctx.post_forward_order))
    return noted


def spoilt(variant: Variant, world_size: int, folder: Path) -> str:
    """What is said of a weight that is not finite in the last rank's part alone."""
    trainer, told = make_trainer(settings(variant, world_size, folder), student=make_student())
    part = local(next(iter(told.student.parameters()))).detach()
    if distributed.rank() == world_size - 1:
        part.view(-1)[-1] = float("nan")
    try:
        trainer._refuse_non_finite_weights()
    except RunError as error:
        return str(error)
    return ""
