"""The gradient of a small batch of the run's own models and rows, tried out through the run's own engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from opd import distributed
from opd.config import Config
from opd.errors import RunError
from opd.loading import Texts
from opd.preflight.alignment import check_alignment
from opd.preflight.descent import check_descent, check_still
from opd.preflight.direction import check_credit, check_direction
from opd.preflight.findings import Finding, Severity
from opd.preflight.sampling import check_ends, check_rollouts, check_sampler
from opd.preflight.stand_ins import Flattened, Remembering, StudentAsTeacher
from opd.preflight.trial import Engine, Step, Trial
from opd.preflight.untouched import as_it_was, undisturbed_randomness, without_dropout
from opd.preflight.weights import check_frozen, check_trained, check_unchanged, fingerprints
from opd.protocols import Method
from opd.sharding import gathered
from opd.sources import SequenceSource
from opd.teachers import SelfTeacher, Teacher
from opd.window import Window

_TEMPERATURES = ("kd_temperature", "teacher_temperature")  # of a method's config: each must reach its loss
_ENDS = {0.0: "forward_kl", 1.0: "reverse_kl"}  # of method.beta
_DIVERGENCES = ("forward_kl", "reverse_kl", "loss_chosen_fkl", "loss_rejected_fkl")  # exact ones, a method's metrics


def check_gradient(
    config: Config,
    method: Method,
    texts: Texts,
    *,
    student: Any,
    teachers: Mapping[str, Teacher],
    source: SequenceSource,
) -> list[Finding]:
    """What the first step would do, tried out. Models and random states are left as they were. Collective."""
    if not len(texts.data.train):
        return []
    before = fingerprints(student, teachers)
    with (
        as_it_was(student),
        undisturbed_randomness(config),
        without_dropout(student),
        TemporaryDirectory() as folder,
    ):
        trial = Trial(config, method, texts, student=student, teachers=teachers, source=source, folder=folder)
        found = list(check_frozen(config, student, teachers))
        found += _tried(trial)
    found += check_unchanged(before, fingerprints(student, teachers))
    return list(dict.fromkeys(found))


def _tried(trial: Trial) -> Iterator[Finding]:
    remembering = {name: Remembering(teacher) for name, teacher in trial.teachers.items()}
    with trial.engine(teachers=remembering) as engine:
        window = engine.window()
        yield from check_ends(trial, window)
        if window.counts["loss_tokens"] == 0:
            yield Finding(
                "gradient.loss_tokens",
                "error",
                "no loss token in the first prompts' completions",
                "there is nothing to learn from",
                "look at data.columns, completions and loss masks",
            )
            return
        step = _first_step(engine, window)
        if step is None:
            yield Finding(
                "gradient.finite",
                "error",
                "the loss of the first prompts is not finite",
                "training would stop at its first step",
                "look for infinite scores; try hardware.precision=fp32",
            )
            return
        yield from _check_counts(trial, window, step)
        yield from check_trained(trial.student, step)
        yield from _check_bounds(trial, step)
    flat = _with_flatter_teachers(trial)
    if (severity := _is_nothing(trial, step, flat)) is not None:
        yield Finding(
            "gradient.descent",
            severity,
            "the loss has no gradient" if severity == "error" else "the loss has hardly any gradient",
            "training would change nothing",
            "is the teacher the student itself, or every weight of the loss 0?",
        )
        return
    yield from _check_teachers(trial, step, flat)
    with trial.engine(teachers=remembering) as engine:
        yield from _check_split(trial, engine, window, step)
        if not trial.needs.surrogate:
            yield from check_descent(trial, engine, window, step, remembering)
        yield from check_still(trial, window, step)
        yield from check_direction(trial, engine, window, step)
        yield from check_credit(trial, window)
        with gathered(trial.student):
            yield from check_alignment(trial, engine, window)
    with gathered(trial.student):
        yield from check_rollouts(trial, window)
        yield from check_sampler(trial, window)
    yield from _check_temperatures(trial, step)
    yield from _check_beta(trial, step)


def _first_step(engine: Engine, window: Window) -> Step | None:
    """None where the loss of some rank is not finite."""
    try:
        step = engine.step(window)
    except RunError:
        step = None
    return None if float(distributed.maximum(torch.tensor(float(step is None)))) else step


def _check_counts(trial: Trial, window: Window, step: Step) -> Iterator[Finding]:
    """The loss is what its sums make of counts that are made again from the sequences."""
    counts = dict(window.counts)
    for kind in (None, *trial.needs.sequences):
        mine = [sequence for sequence in window.sequences if kind is None or sequence.kind == kind]
        lengths = []
        for sequence in mine:
            mask = [False] * len(sequence.prompt_ids) + sequence.completion_mask
            lengths.append(sum(mask[1:]))
        own = {
            "token": sum(lengths),
            "sequence": sum(length > 0 for length in lengths),
            "constant": len(lengths) * trial.config.rollout.max_completion_tokens,
            "sum": 1 / distributed.world_size(),
        }
        own = own.get(trial.config.method.loss_normalization, own["token"])
        both = distributed.total(torch.tensor([own, sum(lengths)], dtype=torch.float64)).tolist()
        prefix = "" if kind is None else f"{kind}_"
        counts |= {f"{prefix}tokens": both[0], f"{prefix}loss_tokens": both[1]}
    wrong = [name for name, count in counts.items() if abs(count - window.counts[name]) > 1e-6 * count]
    shares = [weight * made / (counts[name] or math.inf) for made, name, weight in step.terms]
    expected, size = trial.over_ranks(sum(shares)), trial.over_ranks(sum(map(abs, shares)))
    if wrong or abs(expected - step.loss) > (1e-4 if trial.exact else 1e-2) * size:
        told = ", ".join(f"{name} {window.counts[name]:g} instead of {counts[name]:g}" for name in wrong)
        yield Finding(
            "gradient.loss_tokens",
            "error",
            f"the loss is {step.loss:.6g}, its sums over the sequences' own loss tokens give {expected:.6g} {told}",
            "the effective learning rate would depend on something else than the completions that are trained on",
            "count the tokens of the sequences that reach the loss (opd.window)",
        )


def _check_bounds(trial: Trial, step: Step) -> Iterator[Finding]:
    """A Kullback-Leibler divergence is not negative."""
    for name in _DIVERGENCES:
        numerator, denominator = step.metrics.get(name, (0.0, 1.0))
        if denominator and numerator / denominator < -(1e-4 if trial.exact else 1e-2):
            yield Finding(
                "gradient.bounds",
                "error",
                f"{name} is {numerator / denominator:.4g} nats a token, below 0",
                "what is minimised is no divergence: its minimum is not the teacher",
                "look at truncation to top_k, clipping and renormalisation",
            )


def _check_split(trial: Trial, engine: Engine, window: Window, step: Step) -> Iterator[Finding]:
    """The gradient does not know how the step is cut into micro-batches."""
    ones = trial.batches(micro_batch_size=len(trial.needs.sequences))
    parts = ones.parts(window.sequences)
    if len(parts) == len(window.batches):
        return
    split = engine.step(replace(window, batches=[ones.batch(part) for part in parts]))
    tolerance = 1e-3 if trial.exact else 0.1
    if (gap := step.distance(split)) > tolerance * max(step.norm, split.norm):
        yield Finding(
            "gradient.split",
            "error",
            f"the gradient of {len(window.batches)} micro-batches is {step.norm:.4g} long, of {len(parts)} "
            f"{split.norm:.4g}, and they differ by {gap:.2g}",
            "train.micro_batch_size must only change memory",
            "divide sums by counts of the whole step, once",
        )


def _with_flatter_teachers(trial: Trial) -> dict[str, Step]:
    """The same step, by name with one teacher in doubt; without those whose loss is not finite then."""
    made = {}
    for name, teacher in trial.teachers.items():
        with trial.engine(teachers={**trial.teachers, name: Flattened(teacher)}) as engine:
            made[name] = _first_step(engine, engine.window())
    return {name: step for name, step in made.items() if step is not None}


def _is_nothing(trial: Trial, step: Step, flat: Mapping[str, Step]) -> Severity | None:
    """Whether the gradient of all ranks is 0, or next to nothing beside what another teacher would give."""
    norms = torch.tensor([step.norm, max((other.norm for other in flat.values()), default=0.0)], dtype=torch.float64)
    own, others = distributed.total(norms).tolist()
    if own <= (1e-6 if trial.exact else 0.0) * others:
        return "error"
    return "warning" if own <= (1e-5 if trial.exact else 1e-3) * others else None


def _check_teachers(trial: Trial, step: Step, flat: Mapping[str, Step]) -> Iterator[Finding]:
    """Every teacher's scores reach loss and gradient; where the method says so, the student's own leave none."""
    scale = max(step.norm, *(other.norm for other in flat.values())) if flat else step.norm
    for name, other in flat.items():
        if _same(trial, step, other):
            yield Finding(
                "gradient.teacher_matters",
                "error",
                f"a {name} with flatter distributions gives the same loss and gradient",
                "the teacher is not what is learnt from",
                "look for its scores on their way to the loss",
            )
    if not trial.needs.fixed_point:
        return
    own = SelfTeacher(trial.student, "current", vocab_size=trial.texts.vocabulary.size, hardware=trial.config.hardware)
    batches, top_k = trial.batches(), trial.config.model.teacher.top_k
    itself = StudentAsTeacher(own, lambda sequences: batches.batch(list(sequences)).layout, top_k)
    with trial.engine(teachers=dict.fromkeys(trial.teachers, itself)) as engine:
        fixed = _first_step(engine, engine.window())
    if fixed is None:
        return
    if not (trial.needs.window or trial.needs.surrogate):  # whose loss is a divergence in expectation alone
        yield from _check_minimum(trial, step, fixed)
    if fixed.norm > (1e-3 if trial.exact else 0.1) * scale:
        yield Finding(
            "gradient.fixed_point",
            "error",
            f"a teacher equal to the student leaves a gradient of {fixed.norm:.3g}, the run's own {step.norm:.3g}",
            "the loss does not have its minimum at the teacher",
            "look at the loss's positions, temperature and normalisation",
        )


def _check_minimum(trial: Trial, step: Step, fixed: Step) -> Iterator[Finding]:
    """A divergence is nowhere smaller than where both models are one."""
    if step.loss < fixed.loss - (1e-4 if trial.exact else 1e-2) * max(abs(step.loss), abs(fixed.loss), 1e-2):
        clipped = step.metrics.get("clip_fraction", (0.0, 1.0))[0] > 0  # an option of some methods, with this effect
        yield Finding(
            "gradient.bounds",
            "warning" if clipped else "error",
            f"the loss is {step.loss:.4g}, below the {fixed.loss:.4g} of a teacher equal to the student",
            "it is no divergence: learning would go on past the teacher, or away from it",
            "look at its sign, and at truncation, clipping and renormalisation",
        )


def _check_temperatures(trial: Trial, step: Step) -> Iterator[Finding]:
    """A temperature of the loss reaches it."""
    needs, settings = trial.needs, trial.config.method
    dense = all(need.scores == "dense" or trial.config.model.teacher.top_k is None for need in needs.teachers.values())
    if not dense or any(teacher.is_kept for teacher in trial.teachers.values()):
        return
    for key in _TEMPERATURES:
        value = getattr(settings, key, None)
        if value is None:
            continue
        made = _with_setting(trial, key, 1.5 * value)
        if made is not None and _same(trial, step, made):
            yield Finding(
                "gradient.temperature",
                "error",
                f"method.{key}={1.5 * value:g} gives the same loss and gradient as method.{key}={value:g}",
                "the setting has no effect",
                "divide both models' logits by it in the loss",
            )


def _check_beta(trial: Trial, step: Step) -> Iterator[Finding]:
    """At the ends of method.beta the loss is the divergence that the method reports under that name."""
    settings = trial.config.method
    plain = settings.loss_normalization == "token" and getattr(settings, "kd_temperature", 1.0) == 1.0
    altered = [getattr(settings, key, None) for key in ("token_clip", "top_k")]
    if not hasattr(settings, "beta") or not plain or any(altered) or trial.needs.surrogate:
        return
    for beta, name in _ENDS.items():
        made = _with_setting(trial, "beta", beta) if name in step.metrics else None
        if made is None or {(count, weight) for _, count, weight in made.terms} != {("tokens", 1.0)}:
            return
        loss, (divergence, _) = sum(term for term, _, _ in made.terms), made.metrics[name]
        if abs(loss - divergence) > (1e-3 if trial.exact else 0.1) * max(abs(loss), abs(divergence)):
            yield Finding(
                "gradient.beta",
                "error",
                f"with method.beta={beta:g} the loss is {loss:.4g} nats where train/{name} sums to {divergence:.4g}",
                "another divergence is minimised than the one that is named",
                "look at the order of the two models in it",
            )


def _with_setting(trial: Trial, key: str, value: float) -> Step | None:
    """The first step of the method with another value at a key of its config."""
    method = copy.copy(trial.method)
    method.config = trial.config.method.model_copy(update={key: value})
    with trial.engine(method=method) as engine:
        return _first_step(engine, engine.window())


def _same(trial: Trial, one: Step, other: Step) -> bool:
    """Whether both loss and gradient are the same in both, on every rank."""
    near = 1e-5 if trial.exact else 1e-3
    gap = one.distance(other) > near * max(one.norm, other.norm)
    loss = abs(one.loss - other.loss) > near * max(abs(one.loss), abs(other.loss))
    return not float(distributed.maximum(torch.tensor(float(loss or gap))))
