"""The run's settings in transformers' words, with DeepSpeed's beside them where the student is trained with ZeRO."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments

from opd import zero
from opd.config import Config, Hardware, Train
from opd.deepspeed_config import deepspeed_config


def training_arguments(config: Config, *, max_steps: int, num_micro_batches: int, num_rows: int) -> TrainingArguments:
    """opd's settings as transformers names them; logging, evaluation and trackers are opd's own.

    `num_rows`: of a pass over the data.
    """
    train, hardware = config.train, config.hardware
    save_every = _save_every(config, num_rows)
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}
    arguments = TrainingArguments(
        output_dir=config.run.dir,
        seed=config.run.seed % 2**32,
        max_steps=max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=num_micro_batches,
        learning_rate=train.learning_rate,
        optim={"adamw": "adamw_torch", "rmsprop": "rmsprop", "sgd": "sgd"}[train.optimizer],
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        weight_decay=train.weight_decay,
        lr_scheduler_type=schedule[train.lr_scheduler],
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_ratio} if train.lr_scheduler == "cosine" else None,
        warmup_steps=warmup_steps(train, max_steps),
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        use_cpu=hardware.device == "cpu",
        deepspeed=_zero(hardware),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # one process uses one GPU: transformers would spread its batches over all it can see
        arguments._n_gpu = 1
    return arguments


def warmup_steps(train: Train, max_steps: int) -> int:
    """Steps before the learning rate is the one that was asked for."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * max_steps)


def _save_every(config: Config, num_rows: int) -> int:
    """Steps between checkpoints; 0: none."""
    train = config.train
    return -(-num_rows // train.batch_size) if train.save_every_epoch else train.save_every_steps


def _zero(hardware: Hardware) -> dict[str, Any] | None:
    """DeepSpeed's configuration, if the student is trained with it. Its process group is there then."""
    if not hardware.sharding.startswith("zero"):
        return None
    zero.join(hardware)
    return deepspeed_config(hardware)
