"""Whether learning goes where it should: towards what the teacher or the data prefers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from opd import distributed
from opd.preflight.descent import Displacement
from opd.preflight.findings import Finding
from opd.preflight.trial import Engine, Step, Trial
from opd.protocols import TokenSequence
from opd.window import Window

_SMALL_STEP = 1e-3  # of the length of the weights
_TRIES = 4  # each a quarter of the one before
_RAISED = 0.1  # nats, added to one of the teacher's log-probabilities
_FEW = 8  # loss tokens, below which one of them moves the mean of all too much


def check_direction(trial: Trial, engine: Engine, window: Window, step: Step) -> Iterator[Finding]:
    """A method that learns from answers of the data alone makes them likelier, and rejected ones less likely."""
    needs = trial.needs
    displacement = Displacement(trial, step)
    from_data = not needs.rollouts and all(need.scores == "logprobs" for need in needs.teachers.values())
    if not from_data or needs.label_states or not displacement.squared:
        return
    before, lowered = _preference(engine, window), []
    for shrink in range(_TRIES):
        with displacement.by(-_SMALL_STEP * 4.0**-shrink * displacement.unit):
            lowered.append(before - _preference(engine, window))
        if lowered[-1] <= 0:
            return
    if lowered:
        yield Finding(
            "gradient.direction",
            "error",
            f"one step lowers the log-probability of the rows' answers (less that of rejected ones) by "
            f"{lowered[-1]:.3g} nats",
            "the student unlearns what the data shows",
            "look at the loss's sign, and at which answer is chosen",
        )


def check_credit(trial: Trial, window: Window) -> Iterator[Finding]:
    """What the teacher says of a token tells on the weight of this token or of earlier ones, in the same direction.

    A weight that does not depend on the token, or only of a later one, has a gradient whose expectation is 0.
    """
    if not trial.needs.window:
        return
    sequences = [sequence for sequence in window.sequences if sequence.origin != "dataset"]
    chosen = max(sequences, key=lambda sequence: sequence.num_loss_tokens, default=None)
    before = _weights(trial, window.sequences, None)
    after = _weights(trial, window.sequences, chosen)
    if chosen is None or not 1 < chosen.num_loss_tokens < sum(s.num_loss_tokens for s in sequences) - _FEW:
        return
    here = next(i for i, sequence in enumerate(window.sequences) if sequence is chosen)
    for name, column in before.items():
        others = [i for i in range(len(column)) if i != here]
        old, new = (torch.cat([values[i] for i in others]) for values in (column, after[name]))
        offset, slope = _line(old, new)  # centring and whitening move all tokens along one
        spread = float((new - offset - slope * old).abs().max())
        own = after[name][here] - offset - slope * column[here]
        top = float(own[own.abs().argmax()])
        if top > max(2 * spread, 1e-4 * max(float(values.abs().max()) for values in column if len(values))):
            continue
        yield Finding(
            "gradient.credit",
            "error",
            f"a token that the teacher finds {_RAISED} nats likelier changes its sequence's {name} by {top:.3g}, "
            f"others' by {spread:.3g}",
            "the policy gradient would lead nowhere, or away from the teacher",
            "credit a token with its own and later log-ratios, teacher less student",
        )


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(offset, slope) of the straight line through the points, by least squares."""
    deviation = x - x.mean()
    slope = float((deviation * y).sum() / deviation.square().sum()) if deviation.any() else 1.0
    return float(y.mean()) - slope * float(x.mean()), slope


def _preference(engine: Engine, window: Window) -> float:
    """Σ log π of the answers, less that of rejected ones, over all ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in window.batches:
        logprobs = engine.student_logprobs(batch, 1.0).double().cpu()
        signs = torch.tensor([-1.0 if s.kind == "rejected" else 1.0 for s in batch.sequences], dtype=torch.float64)
        total += (signs[batch.layout.owner.cpu()] * logprobs).sum()
    return float(distributed.total(total))


def _weights(trial: Trial, sequences: list[TokenSequence], raised: TokenSequence | None) -> dict[str, list[Tensor]]:
    """What the window part of the method makes, a sequence at a time; the teachers like the end of one better."""
    copies = [replace(sequence, token_scores=dict(sequence.token_scores)) for sequence in sequences]
    told = [f"{name}_logprobs" for name in trial.needs.teachers]
    for copied, sequence in zip(copies, sequences, strict=True):
        if sequence is raised:
            for name in told:
                column = copied.token_scores[name].clone()
                column[-1] += _RAISED
                copied.token_scores[name] = column
    trial.method.window(copies, distributed.total)
    made = [name for name in copies[0].token_scores if not name.endswith("_logprobs")] if copies else []
    return {name: [copied.token_scores[name] for copied in copies] for name in made}
