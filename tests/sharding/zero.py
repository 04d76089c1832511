"""What is done to a student that DeepSpeed trains (ZeRO) and, by a single process, to one that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from contract.tiny import make_model, make_trainer, train
from contract.variants import Variant

from opd import zero
from opd.config import Config
from opd.models import attach_objective, freeze, within_forward
from opd.sharding import communicates, gathered, is_sharded, parameter_bytes, whole, whole_state
from opd.teachers import WithoutAdapter
from sharding import fsdp2


def settings(stage: str, variant: Variant, world_size: int, folder: Path, **train_settings: Any) -> Config:
    """The stage where there is more than one process."""
    sharding = {"sharding": stage if world_size > 1 else "ddp"}
    return fsdp2.settings(variant, world_size, folder, hardware=sharding, train=train_settings)


def trained(stage: str, variant: Variant, world_size: int, folder: Path, **more: Any) -> dict[str, Any]:
    """Two steps of the variant."""
    sharding = {"sharding": stage if world_size > 1 else "ddp"}
    return fsdp2.trained(variant, world_size, folder, steps=2, hardware=sharding, **more)


def in_half_precision(stage: str, variant: Variant, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Six steps in bf16 by AdamW, by this stage and by DDP."""
    adamw = {"optimizer": "adamw", "learning_rate": 3e-3}
    return [
        fsdp2.trained(
            variant, world_size, folder, steps=6, hardware={"sharding": sharding, "precision": "bf16"}, train=adamw
        )
        for sharding in (stage, "ddp")
    ]


def with_an_empty_step(stage: str, variant: Variant, world_size: int, folder: Path) -> dict[str, Any]:
    """Three steps, the second without a loss token, with momentum, weight decay and a schedule; the weights after each."""
    adamw = {"optimizer": "adamw", "weight_decay": 0.1, "lr_scheduler": "linear"}
    config, kept = settings(stage, variant, world_size, folder, **adamw), []
    student, size = make_model("llama", 1), config.train.batch_size
    told = train(
        config,
        student=student,
        steps=3,
        empties=lambda number, kind: number // size == 1,
        after_step=lambda: kept.append({name: value.clone() for name, value in whole_state_of(student).items()}),
    )
    return {"named": told.named, "weights": kept}


def whole_state_of(student: Any) -> dict[str, torch.Tensor]:
    return whole_state(student) if is_sharded(student) else student.state_dict()


def resumed(stage: str, variant: Variant, world_size: int, folder: Path, **student: Any) -> list[dict[str, Any]]:
    """Six steps, and the last three of them again from the checkpoint in the middle, by AdamW."""
    folder = folder / f"resumed-{stage}-{variant}-{len(student)}"
    config = settings(stage, variant, world_size, folder, optimizer="adamw", save_every_steps=3, keep_checkpoints=2)
    told = []
    for checkpoint in (None, folder / "checkpoint-3"):
        torch.manual_seed(7)  # dropout's, until the checkpoint's state is there
        trainer, said = make_trainer(config, student=fsdp2.make_student(**student), steps=6)
        trainer.resume(checkpoint)
        told.append(fsdp2.told_of(said))
    return told


def gathered_alone(variant: Variant, world_size: int, folder: Path) -> dict[str, Any]:
    """Logits that only the first rank computes while the student is whole, between two trainings' steps."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    trainer, told = make_trainer(
        settings("zero3", variant, world_size, folder), student=make_model("llama", 1), steps=1
    )
    trainer.train()
    ids, student, logits = torch.arange(1, 9).view(2, 4), told.student, None
    state = whole_state(student)
    with gathered(student), gathered(student), torch.no_grad():
        alone = communicates(student)
        if trainer.args.process_index == 0:
            logits = student(input_ids=ids).logits
    reference = make_model("llama", 1)
    if state:
        reference.load_state_dict(state)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    return {
        "logits": (logits, expected),
        "communicates": (communicates(student), alone),
        "loads_in_parts": is_deepspeed_zero3_enabled(),
    }


def base_as_teacher(variant: Variant, world_size: int, folder: Path) -> tuple[bool, bool]:
    """Whether forwards of the base under the student's adapter are collective: between steps, and while it is whole."""
    student = fsdp2.make_student(dropout=0.0)
    trainer, told = make_trainer(settings("zero3", variant, world_size, folder), student=student)
    trainer.train()
    base = WithoutAdapter(told.student)
    with gathered(told.student):
        alone = communicates(base)
    return communicates(base), alone


def frozen(kind: str, dtype: torch.dtype, world_size: int, folder: Path) -> dict[str, Any]:
    """A teacher in parts: what it says of other rows on each rank, several times, and what the whole one said."""
    from opd.data.collate import lay_out
    from opd.models import read_head
    from opd.objectives import token_logprobs
    from opd.protocols import Dense, TokenView

    config = fsdp2.settings(Variant("sft", "defaults", ()), world_size, folder)
    model = freeze(make_model(kind, 3).to(dtype))
    attach_objective(model)
    rows = [TokenView(list(range(3 + rank, 12)), [True] * (9 - rank)) for rank in range(world_size)]
    layout = lay_out([rows[torch.distributed.get_rank()]], pad_id=0, device=torch.device("cpu"))

    def logprobs() -> torch.Tensor:
        def read(hidden: torch.Tensor) -> torch.Tensor:
            return token_logprobs(Dense(hidden, read_head(model)), layout.targets)

        with torch.no_grad():
            return within_forward(model, layout, read)

    before, held, head = logprobs(), parameter_bytes(model), model.get_output_embeddings().weight.clone()
    zero.join(config.hardware)
    zero.shard_for_inference(model)
    said = [logprobs() for _ in range(3)]
    return {
        "before": before,
        "said": said,
        "bytes": (held, parameter_bytes(model)),
        "head": (head, whole(model.get_output_embeddings().weight)),
        "dtypes": {parameter.dtype for parameter in model.parameters()},
    }
