"""How a model lies on the ranks: whole on each of them, or a shard of every weight on each (FSDP2).

No other room knows how a parameter is sharded. FSDP2 is applied in place: the model stays what it is, its parameters
become DTensors, and hooks gather the weights of a layer while its forward or backward runs. What a caller must know:

- forwards of a sharded model are collective: every rank makes as many;
- outside of a forward of the whole model, and of `gathered`, no weight is whole: a head is read inside that forward;
- the hooks are the whole model's and its layers'; a forward of the backbone alone leaves the embeddings in shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opd import distributed, zero
from opd.config import Hardware
from opd.models import attach_objective, causal_lm, compute_dtype, decoder_layers


def shard(model: Any, key: str, *, hardware: Hardware, trained: bool = True) -> None:
    """FSDP2, in place: a group a decoder layer, and one of all else, tied embeddings and head together.

    A trained model is gathered in the precision that it computes in, and its gradients are averaged in float32; its
    shards keep their dtype, and so do the optimizer's states. A frozen one is gathered as it is. `key` names the
    setting that asked for it. Raises ConfigError for a family that does not tell its layers.
    """
    attach_objective(model)
    inner: Any = causal_lm(model)
    mixed = MixedPrecisionPolicy()
    if trained and hardware.precision != "fp32":
        # Autocast casts inputs already; casting them here would also round what families keep in float32.
        mixed = MixedPrecisionPolicy(compute_dtype(hardware), torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(hardware.device, (distributed.world_size(),))
    for module in (*decoder_layers(inner, key), inner):
        # The root too: what is read between forwards (the optimizer, an average, a checkpoint) are always the shards.
        fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    # Which module is the root is otherwise found out by the first forward, which may be a layer's under `gathered`.
    inner._get_fsdp_state()._lazy_init()
    if not trained:
        inner.register_forward_hook(lambda *_: _forget_forwards(inner))


def is_sharded(model: Any) -> bool:
    """Whether its weights lie in shards, so that its forwards are collective."""
    return bool(_groups(model)) or zero.is_partitioned(model)


def communicates(model: Any) -> bool:
    """Whether its forwards are collective now: within `gathered` those of a sharded model are not."""
    if zero.is_partitioned(model):
        return zero.communicates(causal_lm(model))
    return is_sharded(model) and any(local(p) is not p for p in model.parameters())


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Every rank holds whole weights, in the precision of its forwards, which then do not communicate.

    For rollouts, evaluation and reading weights; entered and left by all ranks together. What is written to the weights
    meanwhile is lost. Nothing happens to a whole model, nor within another `gathered`.
    """
    if zero.is_partitioned(causal_lm(model)):
        with zero.gathered(causal_lm(model)):
            yield
        return
    if not _in_shards(model):
        yield
        return
    try:
        _gather(model)
        yield
    finally:
        _scatter(model)


@contextmanager
def scattered(model: Any) -> Iterator[None]:
    """The shards again, within `gathered`: what is written to them is what later forwards read. Collective there."""
    if not is_sharded(model) or _in_shards(model):
        yield
        return
    try:
        _scatter(model)
        yield
    finally:
        _gather(model)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a weight or of its gradient, on every rank; of what is whole, itself. Collective."""
    if zero.is_partition(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a weight or of its gradient, sharing its memory; of what is whole, itself."""
    if zero.is_partition(tensor):
        return zero.part_of(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(model: Any) -> dict[str, Tensor]:
    """The state dict in whole tensors of the shards' dtype, on the CPU of rank 0; {} elsewhere. Collective.

    One weight at a time is whole on the device. Tied weights are one tensor here too. Of a model with an adapter it is
    what is trained alone, which is what peft saves.
    """
    state: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if hasattr(model, "peft_config") and not value.requires_grad:
            continue
        if id(value) not in made:
            tensor = whole(value).detach()
            made[id(value)] = tensor.cpu() if distributed.rank() == 0 else torch.empty(0)  # which frees the whole
        state[name] = made[id(value)]
    return state if distributed.rank() == 0 else {}


def parameter_bytes(model: Any) -> int:
    """Bytes of the parameters that this rank holds between forwards."""
    held = (local(parameter) for parameter in model.parameters())
    return sum(part.numel() * part.element_size() for part in held)


def num_parameters(model: Any) -> int:
    """Numbers in the weights of the whole model, wherever they lie."""
    inner: Any = causal_lm(model)
    if zero.is_partitioned(inner):  # between uses they are empty
        return sum(int(parameter.ds_numel) for parameter in inner.parameters())
    return inner.num_parameters()


def _groups(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _in_shards(model: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _gather(model: Any) -> None:
    for group in _groups(model):
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()


def _scatter(model: Any) -> None:
    for group in _groups(model):
        group.set_reshard_after_forward(True, recurse=False)
        group.reshard()
    _forget_forwards(model)


def _forget_forwards(model: Any) -> None:
    """Let the next backward pass gather ahead for the forwards after this one alone.

    FSDP2 notes every forward, evaluations too, and drops its notes in a backward pass only. Ranks that evaluated
    unequally many rows would then gather different layers ahead, and wait for each other; and of a frozen model the
    notes would grow for ever.
    """
    for module in _groups(model):
        state = module._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        # Older releases of torch have one group a module.
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            group._post_forward_indices.clear()
