"""The student as its own teacher: as it is, as it was before training, or averaged over training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opd import distributed
from opd.config import Hardware
from opd.models import causal_lm, computing, evaluation_mode, freeze, predicting_states, read_head
from opd.objectives import token_logprobs
from opd.protocols import Dense, Layout, TokenSequence
from opd.teachers.base import Teacher


class WithoutAdapter:
    """A student's base, as a model of its own that is frozen: the student with its adapter off, and no second copy.

    What is called of it, the whole or the backbone, runs in evaluation mode and without the adapter.
    """

    def __init__(self, student: Any, part: Any = None) -> None:
        self._student = student
        self._part = causal_lm(student) if part is None else part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with evaluation_mode(self._student), self._student.disable_adapter():
            return self._part(*args, **kwargs)

    @property
    def base_model(self) -> WithoutAdapter:
        """Without the head."""
        return WithoutAdapter(self._student, self._part.base_model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class SelfTeacher(Teacher):
    """Scores with the student's own weights, in the precision that the student trains in.

    "initial" costs a second copy of the model, or none where the student is its base and a fresh adapter: the base is
    then what it was. "ema" keeps an average of the trainable weights, w ← decay · w + (1 - decay) · student, updated
    after every optimizer step and part of every checkpoint.
    """

    def __init__(
        self,
        student: Any,
        mode: Literal["current", "initial", "ema"],
        *,
        vocab_size: int,
        hardware: Hardware,
        ema_decay: float = 0.999,
        fresh_adapter: bool = False,
    ) -> None:
        self._vocab_size, self._hardware, self._decay = vocab_size, hardware, ema_decay
        self._student = student
        self._model = student
        self._average: dict[str, Tensor] = {}
        self._as_teacher: Any = nullcontext
        if mode == "initial" and fresh_adapter:
            self._as_teacher = student.disable_adapter
        elif mode == "initial":
            self._model = freeze(copy.deepcopy(student))
        elif mode == "ema":
            self._average = {name: p.detach().clone() for name, p in self._trained()}
            self._as_teacher = self._averaged

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Dense:
        """Hidden states and head of the loss tokens."""
        with self._scoring():
            return self._dense(layout)

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """log p(targets[n]), (N,)."""
        with self._scoring():
            return token_logprobs(self._dense(layout), layout.targets, temperature=temperature)

    def after_step(self) -> None:
        """Move the average towards the student."""
        with torch.no_grad():
            for name, parameter in self._trained() if self._average else ():
                self._average[name].lerp_(parameter.detach(), 1 - self._decay)

    def save(self, folder: Path) -> None:
        """The average; every other mode is made again from the student."""
        if self._average and distributed.rank() == 0:
            torch.save(self._average, folder / "ema.pt")

    def load(self, folder: Path) -> None:
        """The average of that checkpoint."""
        if self._average:
            saved = torch.load(folder / "ema.pt", weights_only=True)
            for name, average in self._average.items():
                average.copy_(saved[name])

    def _dense(self, layout: Layout) -> Dense:
        model = causal_lm(self._model)
        hidden = predicting_states(model, layout)
        head = read_head(model, self._vocab_size)
        # Detached it stays the tensor that scored, whatever the parameter is given back when scoring ends; and it is
        # read outside of autocast, where it must still multiply as the student's does.
        kind = layout.input_ids.device.type
        weight, bias = (None if tensor is None else tensor.detach() for tensor in (head.weight, head.bias))
        if torch.is_autocast_enabled(kind) and weight is not None:
            weight = weight.to(torch.get_autocast_dtype(kind))
            bias = None if bias is None else bias.to(weight.dtype)
        return Dense(hidden, replace(head, weight=weight, bias=bias))

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with evaluation_mode(self._model), self._as_teacher(), computing(self._hardware):
            yield

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with the averaged weights in it."""
        trained = dict(self._trained())
        kept = {name: parameter.data for name, parameter in trained.items()}
        try:
            _put(self._average, trained)
            yield
        finally:
            _put(kept, trained)

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._student.named_parameters() if p.requires_grad]


def _put(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = values[name]
    # Autocast keeps its copies by parameter: within an outer autocast it would go on computing with the other weights.
    torch.clear_autocast_cache()
