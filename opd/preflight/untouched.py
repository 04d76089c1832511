"""What a trial takes hold of and gives back as it was: the student's attributes, its dropout, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from opd.config import Config
from opd.models import causal_lm


@contextmanager
def as_it_was(student: Any) -> Iterator[None]:
    """Attributes, modes and gradients of the student and its config are afterwards what they were."""
    inner = causal_lm(student)
    kept = [(holder, dict(vars(holder))) for holder in {id(h): h for h in (student, inner, inner.config)}.values()]
    modes = [(module, module.training) for module in student.modules()]
    gradients = [(parameter, parameter.grad) for parameter in student.parameters()]
    try:
        yield
    finally:
        for holder, attributes in kept:
            vars(holder).clear()
            vars(holder).update(attributes)
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def without_dropout(student: Any) -> Iterator[None]:
    """Every rate is 0, so that two forwards can be compared; training has them."""
    configs = {id(module.config): module.config for module in student.modules() if hasattr(module, "config")}
    rates = [
        (holder, name, value)
        for holder in (*student.modules(), *configs.values())
        for name, value in vars(holder).items()
        if isinstance(value, float)
        and ("drop" in name or "jitter" in name or (name == "p" and isinstance(holder, nn.Dropout)))
    ]
    try:
        for holder, name, _ in rates:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, value in rates:
            setattr(holder, name, value)


@contextmanager
def undisturbed_randomness(config: Config) -> Iterator[None]:
    """The global random states are afterwards what they were."""
    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if config.hardware.device == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
