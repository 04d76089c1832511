"""The student as its own teacher: as it is, as it was before training, or averaged over training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from opd import distributed
from opd.config import Hardware
from opd.models import attach_objective, causal_lm, computing, evaluation_mode, freeze, read_head, within_forward
from opd.objectives import token_logprobs
from opd.protocols import Dense, Layout, TokenSequence
from opd.sharding import communicates, is_sharded, local, scattered, shard
from opd.teachers.base import Teacher

Result = TypeVar("Result")


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
    after every optimizer step and part of every checkpoint. Where the student lies in shards, so does all of this.
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
            self._average = self._mine()
            self._as_teacher = self._averaged
        attach_objective(self._model)

    def follow(self, key: str) -> None:
        """Hear that the student has been sharded, and follow: own weights are sharded too. Before the first step."""
        if self._model is not self._student:
            shard(self._model, key, hardware=self._hardware)
        if self._average:
            self._average = self._mine()

    @property
    def sharded_model(self) -> Any:
        """See Teacher: the averaged student is gathered anew for every question, even within `gathered`."""
        asked = is_sharded(self._student) if self._average else communicates(self._model)
        return causal_lm(self._model) if asked else None

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Dense:
        """Hidden states and head of the loss tokens."""
        with self._scoring():
            return self._read(layout, self._kept)

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """log p(targets[n]), (N,)."""
        with self._scoring():
            return self._read(layout, lambda dense: token_logprobs(dense, layout.targets, temperature=temperature))

    def after_step(self) -> None:
        """Move the average towards the student."""
        with torch.no_grad():
            for name, parameter in self._trained() if self._average else ():
                average = self._average[name]
                average.lerp_(local(parameter).detach().to(average.dtype), 1 - self._decay)

    def save(self, folder: Path) -> None:
        """The average; every other mode is made again from the student."""
        if self._average and (distributed.rank() == 0 or is_sharded(self._student)):
            torch.save(self._average, folder / self._file)

    def load(self, folder: Path) -> None:
        """The average of that checkpoint."""
        if self._average:
            saved = torch.load(folder / self._file, weights_only=True)
            for name, average in self._average.items():
                average.copy_(saved[name])

    @property
    def _file(self) -> str:
        return f"ema-{distributed.rank()}.pt" if is_sharded(self._student) else "ema.pt"

    def _read(self, layout: Layout, read: Callable[[Dense], Result]) -> Result:
        """`read` of the scores, within the forward that makes them: there the head is whole."""
        model = causal_lm(self._model)
        return within_forward(model, layout, lambda hidden: read(Dense(hidden, read_head(model, self._vocab_size))))

    def _kept(self, dense: Dense) -> Dense:
        """The scores with a head that stays what it was when scoring ends."""
        head = dense.head
        return replace(dense, head=replace(head, weight=self._tensor(head.weight), bias=self._tensor(head.bias)))

    def _tensor(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        kind, kept = parameter.device.type, parameter.detach()
        # It is read outside of autocast, where it must still multiply as the student's does.
        if torch.is_autocast_enabled(kind):
            kept = kept.to(torch.get_autocast_dtype(kind))
        # The parameter is given back another tensor, and this one stays; but of a shard it goes with the forward.
        shares = kept.data_ptr() == parameter.data_ptr()
        return kept.clone() if shares and is_sharded(self._model) else kept

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with evaluation_mode(self._model), self._as_teacher(), computing(self._hardware):
            yield

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with the averaged weights in it."""
        with scattered(self._student):
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        """Trade the trained weights for the averaged ones; of shards the contents, which is what forwards gather."""
        with torch.no_grad():
            for name, parameter in self._trained():
                average = self._average[name]
                if is_sharded(self._student):
                    mine = local(parameter).detach()
                    kept = mine.clone()
                    mine.copy_(average)
                    average.copy_(kept)
                else:
                    self._average[name], parameter.data = parameter.data, average
        # Autocast keeps its copies by parameter: within an outer autocast it would go on with the other weights.
        torch.clear_autocast_cache()

    def _mine(self) -> dict[str, Tensor]:
        """What this rank holds of the student's trainable weights, copied."""
        return {name: local(parameter).detach().clone() for name, parameter in self._trained()}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._student.named_parameters() if p.requires_grad]
