"""Causal language models: loading them, reading their head, and one forward that ends in a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from opd.config import Hardware, LoRA, Model, WalkRecipe
from opd.errors import ConfigError, is_out_of_memory
from opd.protocols import Head, Layout
from opd.quantization import dequantized, is_quantized, keep_differentiable, quantization_config
from opd.tokenizers import COMPLETE, base_of_adapter, first_line

Result = TypeVar("Result")


def load_student(model: Model, path: str, *, dtype: torch.dtype, hardware: Hardware) -> Any:
    """The student: a model, or a base with the adapter that `path` holds, ready to be trained further."""
    key = "model.student.path"
    base = base_of_adapter(path, key)
    loaded = load_model(model, base or path, key, dtype=dtype, hardware=hardware)
    return loaded if base is None else _with_adapter(loaded, path, key, is_trainable=True)


def _with_adapter(base: PreTrainedModel, path: str, key: str, *, is_trainable: bool) -> Any:
    from peft import PeftModel  # noqa: PLC0415  a second of import that most runs do not need

    try:
        return PeftModel.from_pretrained(base, path, is_trainable=is_trainable)
    except Exception as error:  # peft, safetensors and torch each raise types of their own
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{key}={path}: its adapter does not load ({first_line(error)}); {COMPLETE}") from None


def load_model(model: Model, path: str, key: str, *, dtype: torch.dtype, hardware: Hardware) -> PreTrainedModel:
    """The weights: on the CPU, or, quantized, where they are to compute. An adapter is merged into its base.

    Into quantized weights it is not: what was trained on them would be rounded away.
    """
    if (base := base_of_adapter(path, key)) is not None:
        whole = load_model(model, base, key, dtype=dtype, hardware=hardware)
        adapted = _with_adapter(whole, path, key, is_trainable=False)
        return adapted.get_base_model() if is_quantized(whole) else adapted.merge_and_unload()
    quantized = {}
    if model.quantization is not None:
        quantized["quantization_config"] = quantization_config(model.quantization, compute=compute_dtype(hardware))
        quantized["device_map"] = {"": torch.cuda.current_device() if hardware.device == "cuda" else hardware.device}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  a pair with output_loading_info
            path,
            revision=model.revision,
            dtype=dtype,
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **quantized,
        )
    except Exception as error:  # safetensors, torch and transformers each raise types of their own
        if is_out_of_memory(error):
            raise
        if "attention" in str(error).lower():
            setting = f"{key.rsplit('.', 1)[0]}.attention={model.attention}"
            raise ConfigError(f"{setting}: not for this model ({first_line(error)}); set it to eager") from None
        # torch says at length how to load a pickle that may run code; nobody should.
        why = "not a checkpoint of tensors" if isinstance(error, UnpicklingError) else first_line(error)
        raise ConfigError(f"{key}={path}: its weights do not load ({why}); {COMPLETE}") from None
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{key}={path}: {len(missing)} weights are not in it, e.g. {missing[0]}; {COMPLETE}")
    keep_differentiable(loaded)
    return loaded


def merged(student: Any, adapter: Path) -> PreTrainedModel:
    """The student with its adapter, which also lies in that folder, in whole weights. The student is taken apart."""
    if not is_quantized(causal_lm(student)):
        return student.merge_and_unload()
    return _with_adapter(dequantized(student), str(adapter), "run.dir", is_trainable=False).merge_and_unload()


def build_walk_model(recipe: WalkRecipe, tokenizer: Any) -> PreTrainedModel:
    """An untrained Llama of the embedded task's shape; its weights depend on recipe.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.hidden_size,
                intermediate_size=3 * recipe.hidden_size,
                num_hidden_layers=recipe.num_layers,
                num_attention_heads=recipe.num_heads,
                max_position_embeddings=256,
                initializer_range=0.05,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def add_lora(model: PreTrainedModel, lora: LoRA) -> Any:
    """The model with fresh adapters, everything else frozen."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  a second of import that most runs do not need

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        problem = f"does not fit this model ({first_line(error)})"
        raise ConfigError(f"model.student.lora.targets={lora.targets}: {problem}; use all-linear") from None
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise ConfigError(
            f"model.student.lora.targets={lora.targets}: names the output head, which the loss reads directly and LoRA "
            "would not reach; leave it out, or use all-linear"
        )
    return adapted


def disable_dropout(model: PreTrainedModel) -> None:
    """Make the student's training forward the function that is sampled and compared. An adapter keeps its own dropout.

    Families keep their rates in modules, in attributes and in the config that layers read (dropout, layerdrop, router
    jitter); all of them become 0, in the saved config too.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    modules = [module for name, module in model.named_modules() if "lora_dropout" not in name]
    for holder in (*modules, *configs.values()):
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
        rates = [name for name in vars(holder) if "drop" in name or "jitter" in name]
        for name in rates:
            if isinstance(getattr(holder, name), float):
                setattr(holder, name, 0.0)


def save_memory(model: Any) -> None:
    """Keep layers' inputs only, and compute the rest again in the backward pass. Rollouts keep their cache.

    It acts on a model in training mode, and sampling is done in evaluation mode. Non-reentrant: with the base frozen no
    input of a layer needs a gradient, and the other kind would then leave every adapter without one.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        setting = "model.student.gradient_checkpointing=True"
        raise ConfigError(f"{setting}: not for this model ({first_line(error)}); set it to false") from None


def compute_dtype(hardware: Hardware) -> torch.dtype:
    """What hardware.precision computes in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[hardware.precision]


def computing(hardware: Hardware) -> torch.autocast:
    """The precision that training, rollouts and evaluation of the student compute in: autocast, off for fp32."""
    enabled = hardware.precision != "fp32"
    return torch.autocast(hardware.device, dtype=compute_dtype(hardware) if enabled else None, enabled=enabled)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside what wraps it (DDP, peft)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any, key: str) -> list[nn.Module]:
    """The layers that are sharded or moved one at a time. `key` names the setting that asks for it.

    Raises ConfigError for a family that does not tell them.
    """
    inner = causal_lm(model)
    names = getattr(inner, "_no_split_modules", None) or ()
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    if not layers:
        problem = f"{type(inner).__name__} does not tell its layers (_no_split_modules)"
        raise ConfigError(f"{key}: {problem}; set it to {'ddp' if 'sharding' in key else 'local'}")
    return layers


def read_head(model: PreTrainedModel, vocab_size: int | None = None) -> Head:
    """The output head, with what some families do to its logits: Cohere scales, Granite divides, Gemma 2 caps."""
    layer: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap, vocab_size)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """What the head reads, (B, T, H). With position ids and no mask the row is packed (Layout)."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    backbone = model.base_model
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).last_hidden_state


def predicting_states(model: PreTrainedModel, layout: Layout) -> Tensor:
    """What the head reads at a layout's predictors, (N, H)."""
    hidden = hidden_states(model, layout.input_ids, layout.attention_mask, layout.position_ids)
    return hidden.flatten(0, 1)[layout.predictors]


def attach_objective(model: Any) -> None:
    """Let `model(layout=…, objective=f)` return f(hidden states at its predictors): one forward, head included.

    DDP, FSDP2 and ZeRO-3 hook the forward of what they wrap: inside it the head is whole, outside it may not be. Their
    backward hooks hang on the tensors that come out, alone or in tuples: f returns its loss so, whatever else it
    returns beside it. Without `objective` the forward is what it was. Attached twice it is attached once.
    """
    inner: Any = causal_lm(model)
    if hasattr(inner, "plain_forward"):
        return

    @functools.wraps(type(inner).forward)
    def forward(
        self: Any, *args: Any, objective: Callable[[Tensor], Result] | None = None, **kwargs: Any
    ) -> Result | Any:
        if objective is None:
            return self.plain_forward(*args, **kwargs)
        return objective(predicting_states(self, kwargs["layout"]))

    inner.plain_forward = inner.forward
    inner.forward = MethodType(forward, inner)  # a method, so that a deep copy of the model gets its own


def within_forward(model: Any, layout: Layout, objective: Callable[[Tensor], Result]) -> Result:
    """objective(hidden states at the layout's predictors), from inside the model's forward if it takes objectives.

    Of a sharded model it must: nowhere else is the head whole.
    """
    if hasattr(model, "plain_forward"):
        return model(layout=layout, objective=objective)
    return objective(predicting_states(model, layout))


@torch.no_grad()
def check_head(model: PreTrainedModel, key: str) -> None:
    """Refuse an architecture whose logits are not finish(head(hidden)): every loss here relies on it."""
    training = model.training
    model.eval()
    ids = torch.arange(1, 6, device=model.device)[None]
    mask = torch.ones_like(ids)

    def logits(hidden: Tensor) -> Tensor:
        head = read_head(model)
        assert head.weight is not None
        return head.finish(nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float())

    ours = within_forward(model, _every_position(ids, mask), logits).view(*ids.shape, -1)
    theirs = model(input_ids=ids, attention_mask=mask).logits.float()
    model.train(training)
    head: Any = model.get_output_embeddings()
    exact = head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(ids.device.type)
    tolerance = 1e-3 if exact else 5e-2
    if ours.shape != theirs.shape or not torch.allclose(
        ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item()
    ):
        raise ConfigError(
            f"{key}: {type(model).__name__} does something to its logits that opd does not know; "
            "teach opd.models.read_head about it"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, key: str) -> None:
    """Refuse an architecture that lets the sequences of a packed row see each other: some do, without a word."""
    training = model.training
    model.eval()
    # Two rows: flash attention tells packed sequences apart in one row only.
    ids = torch.arange(1, 13, device=model.device).view(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=model.device)
    last = ids[:, 3:]

    def states(input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        layout = _every_position(input_ids, mask, position_ids)
        return within_forward(model, layout, lambda hidden: hidden).view(*input_ids.shape, -1)

    packed = states(ids, None, positions)[:, 3:]
    alone = states(last, torch.ones_like(last))
    model.train(training)
    if not torch.allclose(packed.float(), alone.float(), rtol=5e-2, atol=5e-2 * alone.float().abs().max().item()):
        raise ConfigError(
            f"train.packing=True: {type(model).__name__} ({key}) lets the sequences of a packed row see each other; "
            "set it to false"
        )


def _every_position(ids: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Layout:
    """A layout that asks for the states of all tokens, (B·T, H)."""
    everything = torch.arange(ids.numel(), device=ids.device)
    return Layout(ids, mask, position_ids, everything, ids.flatten(), everything // ids.shape[1])
