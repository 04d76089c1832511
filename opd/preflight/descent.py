"""What a small step along the gradient does: the loss falls as predicted, and the teachers stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor

from opd.objectives.fused import final_logits
from opd.preflight.findings import Finding
from opd.preflight.stand_ins import Remembering
from opd.preflight.trial import Engine, Step, Trial
from opd.protocols import Dense
from opd.sharding import local
from opd.teachers import asked_unevenly
from opd.window import Window

_FIRST_STEP = 0.02  # of the length of the weights
_TRIES = 10  # each a quarter of the one before: a model that was trained too fast is smooth only very near
_SHOWN_TOKENS = 16


class Displacement:
    """The sampled numbers of the trainable weights, moved along the gradient and put back exactly.

    `fixed`: addresses of weights that stay.
    """

    def __init__(self, trial: Trial, step: Step, fixed: Set[int] = frozenset()) -> None:
        pairs = zip(trial.trained, step.gradient, strict=True)
        self._moving = [
            (trial.numbers_of(p), gradient) for (_, p), gradient in pairs if local(p).data_ptr() not in fixed
        ]
        self.squared = trial.over_ranks(_squared([gradient for _, gradient in self._moving]))
        size = trial.over_ranks(_squared([numbers for numbers, _ in self._moving]))
        self.unit = (size / self.squared) ** 0.5 if self.squared else 0.0  # rate that moves by the weights' own length

    @contextmanager
    def by(self, rate: float) -> Iterator[None]:
        """weights + rate · gradient, for a while."""
        kept = [numbers.clone() for numbers, _ in self._moving]
        try:
            for numbers, gradient in self._moving:
                numbers.add_(gradient, alpha=rate)
            yield
        finally:
            for (numbers, _), old in zip(self._moving, kept, strict=True):
                numbers.copy_(old)


def _squared(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def check_descent(
    trial: Trial, engine: Engine, window: Window, step: Step, teachers: Mapping[str, Remembering]
) -> Iterator[Finding]:
    """Along the gradient the loss of the same sequences and scores changes as the gradient says.

    A central difference over a step that shrinks until it fits, or until rounding hides it: then nothing is said, as
    of a student that all but is its teacher. Half precision may be too coarse for any.
    """
    read: set[int] = set().union(*(teacher.heads for teacher in teachers.values()))  # its scores would move too
    displacement = Displacement(trial, step, read)
    if not displacement.squared:
        return
    ratios, low, high = [], *((0.8, 1.25) if trial.exact else (0.5, 2.0))
    visible = (2e-5 if trial.exact else 2e-3) * max(1.0, abs(step.loss))
    for shrink in range(_TRIES):
        rate = _FIRST_STEP * 4.0**-shrink * displacement.unit
        if 2 * rate * displacement.squared < visible:
            break
        with displacement.by(rate):
            above = engine.loss(window)
        with displacement.by(-rate):
            below = engine.loss(window)
        ratios.append((above - below) / (2 * rate * displacement.squared))
        if low < ratios[-1] < high:
            return
    if not ratios:
        return
    nearest = min(ratios, key=lambda ratio: abs(ratio - 1))
    yield Finding(
        "gradient.descent",
        "error" if trial.exact and not 0.1 < nearest < 10 else "warning",
        f"along its gradient the loss changes by {nearest:.3g} times what the gradient says",
        "a step would not lower what is logged as the loss",
        "look for scores without a gradient, a sign, or a factor that loss and gradient do not share",
    )


def check_still(trial: Trial, window: Window, step: Step) -> Iterator[Finding]:
    """Teachers with weights of their own score the same after the student has moved."""
    displacement = Displacement(trial, step)
    with asked_unevenly(trial.teachers.values()):
        if not displacement.squared:
            return
        before = _scores(trial, window)
        with displacement.by(-_FIRST_STEP * displacement.unit):
            after = _scores(trial, window)
    for name, scores in before.items():
        if not torch.allclose(scores, after[name], rtol=1e-3, atol=1e-3 * float(scores.abs().max())):
            yield Finding(
                "gradient.teacher_unchanged",
                "error",
                f"teacher {name}: its scores move with the student's weights",
                "it is to be a model of its own, or the student as it was",
                "find what they share; a frozen copy is not the same tensors",
            )


def _scores(trial: Trial, window: Window) -> dict[str, Tensor]:
    """Some of what the teachers that are not the student as it is say of one micro-batch."""
    batch = max(window.batches, key=lambda batch: len(batch.layout.targets))
    told = {}
    for name, need in trial.needs.teachers.items():
        teacher = trial.teachers[name]
        if need.model == "current" or need.precompute or teacher.is_kept:
            continue
        with torch.no_grad():
            scores = teacher.score(batch.views.get(name, batch.layout), batch.sequences)
            told[name] = final_logits(scores, slice(_SHOWN_TOKENS)) if isinstance(scores, Dense) else scores.logprobs
    return told
