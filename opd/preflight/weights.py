"""What happens to weights: teachers' must stay what they were, and every one that trains must get a gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opd.config import Config
from opd.errors import OpdError
from opd.models import causal_lm
from opd.preflight.findings import Finding
from opd.preflight.trial import Step
from opd.sharding import local
from opd.teachers import LocalTeacher, Teacher
from opd.tokenizers import read_shape

_HASHED = 2**16  # numbers of a tensor; a larger one is sampled
_SHOWN = 3


def fingerprints(student: Any, teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """A hash of every tensor that a teacher holds of its own, and its shape, by a name that says where it is."""
    return {
        f"{name}: {place}": _fingerprint(tensor)
        for name, teacher in teachers.items()
        for place, tensor in _held(student, teacher)
    }


def check_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Finding]:
    """Teachers are what they were before a forward, a backward and a step were tried out."""
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        yield Finding(
            "gradient.teacher_unchanged",
            "error",
            f"{len(changed)} tensors of teachers were changed by one training step, e.g. {changed[0]}",
            "a teacher that moves is not what is distilled",
            "find what shares or writes these weights",
        )


def check_frozen(config: Config, student: Any, teachers: Mapping[str, Teacher]) -> Iterator[Finding]:
    """Teachers do not train, have the vocabulary that their folder says, and no class of theirs is patched."""
    for name, teacher in teachers.items():
        for module in _modules(student, teacher):
            trainable = [place for place, p in module.named_parameters() if p.requires_grad]
            if trainable:
                yield Finding(
                    "gradient.teacher_unchanged",
                    "error",
                    f"teacher {name}: {len(trainable)} of its weights are trainable, e.g. {trainable[0]}",
                    "they would move with the student",
                    "freeze them",
                )
            yield from _check_width(config, name, module)
    yield from _check_classes(student, teachers)


def check_trained(student: Any, step: Step) -> Iterator[Finding]:
    """What trains gets a finite gradient, and of an adapter nothing else trains."""
    by_state: dict[str, list[str]] = {}
    for name, state in step.gradients.items():
        by_state.setdefault(state, []).append(name)
    if not step.gradients:
        yield Finding(
            "gradient.trainable", "error", "the student has no trainable weight", "", "unfreeze it, or add an adapter"
        )
    if bad := by_state.get("not finite"):
        yield Finding(
            "gradient.trainable",
            "error",
            f"{len(bad)} weights get a gradient that is not finite, e.g. {_some(bad)}",
            "the first step would destroy the student",
            "set hardware.precision=fp32, or look for extreme weights and scores",
        )
    if hasattr(student, "peft_config"):
        yield from _check_adapter(step)
    elif step.norm > 0:
        silent = by_state.get("none", []) + by_state.get("zero", [])
        many = len(silent) > len(step.gradients) // 10
        if silent:
            yield Finding(
                "gradient.trainable",
                "warning" if many and not any("expert" in name for name in silent) else "note",
                f"{len(silent)} of {len(step.gradients)} trainable weights get no gradient, e.g. {_some(silent)}",
                "they would stay what they are",
                "expected only of weights that a few prompts do not reach (experts, positions)",
            )


def _check_adapter(step: Step) -> Iterator[Finding]:
    others = [name for name in step.gradients if "lora_" not in name and "modules_to_save" not in name]
    if others:
        yield Finding(
            "gradient.adapter",
            "error",
            f"{len(others)} weights outside of the adapter are trainable, e.g. {_some(others)}",
            "they would not be saved with it",
            "freeze the base model",
        )
    outer = {name: state for name, state in step.gradients.items() if "lora_B" in name}
    silent = [name for name, state in outer.items() if state in ("none", "zero")]
    if silent and step.norm > 0:
        yield Finding(
            "gradient.adapter",
            "warning" if all("expert" in name for name in silent) else "error",
            f"only {len(outer) - len(silent)} of {len(outer)} adapters get a gradient; none: {_some(silent)}",
            "the others would never learn",
            "choose other model.student.lora.targets; if the base is quantized, set "
            "model.student.quantization to null or to 8bit",
        )


def _check_width(config: Config, name: str, module: nn.Module) -> Iterator[Finding]:
    """The embedding table against the folder's config: a resized teacher has rows that nobody trained."""
    path = getattr(module, "name_or_path", "")
    if not path or not hasattr(module, "get_input_embeddings"):
        return
    try:
        wanted = read_shape(config.model.teacher, path, "model.teacher.path").vocab_size
    except (OpdError, OSError):
        return  # made in memory
    found: Any = module.get_input_embeddings()  # type: ignore[operator]
    rows = found.num_embeddings  # the table itself may lie in shards
    if rows != wanted:
        yield Finding(
            "gradient.teacher_unchanged",
            "error",
            f"teacher {name}: its embedding table has {rows} rows, {path} has {wanted}",
            "it was resized after loading: rows were invented or cut",
            "do not resize teachers; only ids that both models have are compared",
        )


def _check_classes(student: Any, teachers: Mapping[str, Teacher]) -> Iterator[Finding]:
    """Some libraries replace a forward for the whole process, so that every later model of the class has it too."""
    modules = [causal_lm(student), *(m for teacher in teachers.values() for m in _modules(student, teacher))]
    classes = {type(part) for module in modules for part in module.modules()}
    for kind in sorted(classes, key=lambda kind: kind.__qualname__):
        home = {base.__module__ for base in kind.__mro__}
        if kind.forward.__module__ not in home:
            yield Finding(
                "gradient.patched_class",
                "warning",
                f"{kind.__name__}.forward comes from {kind.forward.__module__}",
                "a library has replaced it for every model of this process, the teachers too",
                "do not import or call what patches transformers' classes",
            )


def _held(student: Any, teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    for module in _modules(student, teacher):
        yield from module.named_parameters()
        yield from module.named_buffers()
    for attribute, value in vars(teacher).items():
        if isinstance(value, dict):
            yield from ((f"{attribute}.{key}", item) for key, item in value.items() if isinstance(item, Tensor))


def _modules(student: Any, teacher: Teacher) -> list[nn.Module]:
    """The models that a teacher does not share with the student."""
    models = [teacher.model] if isinstance(teacher, LocalTeacher) else list(vars(teacher).values())
    return [model for model in models if isinstance(model, nn.Module) and model is not student]


def _fingerprint(tensor: Tensor) -> str:
    tensor = local(tensor).detach()  # the whole of a sharded one may come and go
    flat = tensor.reshape(-1)
    flat = flat[:: max(1, flat.numel() // _HASHED)].contiguous().cpu()
    digest = hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"", digest_size=8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {digest.hexdigest()}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
