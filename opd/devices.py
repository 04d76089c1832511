"""hardware.device=auto and hardware.precision=auto become what this machine has, before anything is checked."""

from __future__ import annotations

import copy
from typing import Any


def with_device(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with the device and the precision that "auto" stands for here, in the run and in its stages.

    Device: CUDA, else MPS, else CPU. Precision: on CUDA bf16, or fp16 where the card has no bf16 of its own; else fp32.
    To be asked on the machine that computes: a login node has other devices. Imports torch only where there is an auto.
    """
    found = copy.deepcopy(raw)
    run = found.get("hardware") or {}
    for section in (found, *(found.get("stages") or {}).values()):
        hardware = section.get("hardware") or {}
        if hardware.get("device") == "auto":
            hardware["device"] = _device()
        if hardware.get("precision") == "auto":
            hardware["precision"] = _precision(hardware.get("device") or run["device"])
    return found


def _device() -> str:
    import torch  # noqa: PLC0415  a second, which a config that names its device does not wait for

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _precision(device: str) -> str:
    import torch  # noqa: PLC0415

    if device != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
