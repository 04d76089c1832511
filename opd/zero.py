"""ZeRO: what DeepSpeed needs before it trains, and the weights that stage 3 cuts up.

Stage 3 leaves a parameter empty between uses (`ds_tensor` is this rank's part of it) and hooks gather it for the module
that runs. The hooks of the outermost module begin a forward, so it is that one which is called; they are collective.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opd.config import Hardware
from opd.models import causal_lm


def join(hardware: Hardware) -> None:
    """Give DeepSpeed the process group that there is. Before TrainingArguments, which ask it for the world's size."""
    if hardware.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: PLC0415  half a second, and an extra

    # Its calls that torch would have named otherwise; and that Trainer leaves the accumulation of gradients to it.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    for name in ("accelerate.accelerator", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if hardware.device == "cpu":
        # Its all-reduce through shared memory would be compiled first, for minutes, where a compiler is found at all.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if hardware.device == "cuda" else "gloo", verbose=False)


def keep_to_the_student() -> None:
    """End what would make DeepSpeed's of other models too, now that the engine stands.

    transformers would load every model in parts from here on, on all ranks together, and accelerate would give the next
    Trainer an engine, asked or not.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: PLC0415

    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def shard_for_inference(model: nn.Module) -> None:
    """Stage 3 of a frozen model, in place: a rank keeps its part of each weight. Collective, as its forwards are then.

    The weights keep their dtype. Nothing persists: a weight is whole while the module runs that it belongs to.
    """
    import deepspeed  # noqa: PLC0415

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {name: {"enabled": dtype == kind} for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    # Weight by weight, before the engine would move the whole model to the device.
    deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(engine.device)
    remember(engine)


def remember(engine: Any) -> None:
    """Keep a stage-3 engine with the module that it wraps: it takes its hooks along when it dies.

    Not as a submodule of it, which the engine would then be of itself. What wraps the model (peft) begins the forwards
    of training; of others the model does, which then has to fetch the head that is read in it.
    """
    import deepspeed  # noqa: PLC0415

    inner = causal_lm(engine.module)
    object.__setattr__(inner, "zero_engine", engine)
    if is_partitioned(inner):
        head: Any = inner.get_output_embeddings()
        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(inner, parameter)


def is_partitioned(model: nn.Module) -> bool:
    """Whether stage 3 has cut up its weights."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def is_partition(tensor: Tensor) -> bool:
    """Whether it is a parameter that stage 3 has cut up."""
    return hasattr(tensor, "ds_tensor")


def communicates(model: nn.Module) -> bool:
    """Whether its hooks are in their places, so that forwards are collective."""
    handle = _offload(model).fwd_pre_hook
    return handle.id in handle.hooks_dict_ref()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every weight whole on every rank, and no hook that would take it away. See opd.sharding.gathered."""
    import deepspeed  # noqa: PLC0415

    if not communicates(model):
        yield
        return
    with deepspeed.zero.GatheredParameters(model.parameters()), _without_hooks(model):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Stage 3's hooks taken out and put back in their places: what it learnt of the order of modules stays true."""
    offload = _offload(model)
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    kept = {}
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        kept.setdefault(id(hooks), (hooks, dict(hooks)))
        hooks.pop(handle.id, None)
    try:
        yield
    finally:
        for hooks, before in kept.values():
            added = {number: hook for number, hook in hooks.items() if number not in before}
            hooks.clear()
            hooks.update(before | added)


def _offload(model: nn.Module) -> Any:
    """What holds the hooks: the optimizer's part for it, or, of a model that is not trained, all there is."""
    engine: Any = model.zero_engine  # also of a student WithoutAdapter, which passes on what it is asked
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def whole(parameter: Any) -> Tensor:
    """A copy of the whole parameter; itself, detached, where it is whole. Collective."""
    import deepspeed  # noqa: PLC0415

    if _is_available(parameter):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def part_of(parameter: Any) -> Tensor:
    """What this rank keeps of the parameter: flat, the last part filled up."""
    return parameter.ds_tensor.data


def _is_available(parameter: Any) -> bool:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: PLC0415

    return parameter.ds_status == ZeroParamStatus.AVAILABLE
