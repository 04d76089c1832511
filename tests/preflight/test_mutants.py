"""The mistakes that distillation code makes in silence, made here on purpose: which check tells of each.

A1 … A13 were found by running another library, D1 … D25 are what users of many report. A mutant that no check tells of
stays in the table, and says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contract.tiny import PAD, STOPS, make_examples, make_model
from contract.variants import Variant
from preflight import test_data_checks as rows
from preflight import test_pair as pairs
from preflight.tried import ADAPTER, find
from tokenizers.pre_tokenizers import Digits
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import opd.methods.opsd
import opd.objectives.divergence
import opd.objectives.likelihood
import opd.objectives.preference
import opd.sources.rollouts
import opd.teachers.own
import opd.trainer
import opd.window
from opd import objectives
from opd.data import check_lengths
from opd.errors import ConfigError
from opd.methods.gkd import GKD
from opd.methods.reverse_kl import ReverseKL
from opd.models import causal_lm
from opd.preflight import Finding
from opd.preflight.data import check_data
from opd.protocols import Dense, Sparse, Term, Terms, TokenView
from opd.sources.text_views import TextViews
from opd.teachers import LocalTeacher, SelfTeacher
from opd.trainer import DistillationTrainer
from opd.window import WindowBuilder

LAY_OUT = opd.window.lay_out
CLIPPED_OPSD = Variant("opsd", "hard_clip", ("method.token_clip=0.001", "method.beta=0"))
SOFT_MINILLM = Variant("minillm", "soft", ("method.kd_temperature=2.0",))


def wrapped(patch, owner, name, around):
    """Replace owner.name by around(original, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(functools.partial(around, original)))


def wrapped_method(patch, owner, name, around):
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self, *arguments, **settings):
        return around(original, self, *arguments, **settings)

    patch.setattr(owner, name, method)


# --- what the loss is divided by


def tokens_of_completions_thrown_away(patch):
    lengths = {row.row: 3 * len(row.completion_ids) for row in make_examples()}  # by chance the sums could be alike
    patch.setattr(opd.window, "_num_loss_tokens", lambda made: float(sum(lengths[s.row] for s in made)))


def divided_by_accumulation_steps(patch):
    patch.setattr(DistillationTrainer, "loss_is_scaled_for_ga", False)


def mean_over_each_micro_batch(patch):
    def share(terms, counts):
        tokens = max(1.0, float(next(iter(terms.metrics.values()))[1]))
        return torch.stack([term.weight * term.sum / tokens for term in terms.terms]).sum()

    patch.setattr(opd.trainer, "share_of_step", share)


def not_finite(patch):
    wrapped(patch, opd.trainer, "share_of_step", lambda share, terms, counts: share(terms, counts) * float("nan"))


# --- the loss


def loss_without_temperature(patch):
    def cold(original, teacher, **settings):
        return original(teacher, **{**settings, "temperature": 1.0})

    wrapped(patch, opd.objectives.divergence, "divergence_loss", cold)


def other_direction(patch):
    def swapped(original, teacher, *, beta, **settings):
        return original(teacher, beta=1 - beta, **settings)

    wrapped(patch, opd.objectives.divergence, "divergence_loss", swapped)


def loss_upside_down(patch):
    def negative(original, teacher, **settings):
        loss = original(teacher, **settings)

        def negated(logits, rows):
            values, metrics = loss(logits, rows)
            return -values, metrics

        return negated

    wrapped(patch, opd.objectives.divergence, "divergence_loss", negative)


def top_k_without_the_rest(patch):
    def truncated(original, teacher, **settings):
        assert isinstance(teacher, Sparse)

        def loss(logits, rows):
            student = logits.log_softmax(1).gather(1, teacher.ids[rows])
            return (student.exp() * (student - teacher.logprobs[rows])).sum(1), {}

        return loss

    wrapped(patch, opd.objectives.divergence, "divergence_loss", truncated)


def teacher_of_no_effect(patch):
    def uniform(original, needs, teachers, batch):
        scores = original(needs, teachers, batch)
        return {name: Dense(torch.zeros_like(told.hidden), told.head) for name, told in scores.items()}

    wrapped(patch, opd.trainer, "ask_teachers", uniform)


def labels_instead_of_a_teacher(patch):
    def loss(self, student, teachers, batch):
        summed = objectives.sum_over_tokens(student, objectives.negative_log_likelihood(batch.layout.targets))
        return Terms([Term(summed.loss, "tokens")])

    patch.setattr(GKD, "loss", loss)


def advantages_of_zero(patch):
    def window(self, sequences, total):
        for sequence in sequences:
            sequence.token_scores["advantages"] = torch.zeros_like(sequence.token_scores["student_logprobs"])
        return {}

    patch.setattr(ReverseKL, "window", window)


def advantages(patch, change):
    """`change` makes a sequence's advantages of the right ones."""
    original = ReverseKL.window

    def window(self, sequences, total):
        metrics = original(self, sequences, total)
        for sequence in sequences:
            sequence.token_scores["advantages"] = change(sequence.token_scores)
        return metrics

    patch.setattr(ReverseKL, "window", window)


def advantage_of_the_position(patch):
    """One that is the same whatever token is drawn there: the gradient's expectation is 0."""
    advantages(patch, lambda told: F.pad(told["advantages"][:-1], (1, 0)))


def advantages_upside_down(patch):
    advantages(patch, lambda told: -told["advantages"])


def likelihood_upside_down(patch):
    def positive(original, targets):
        loss = original(targets)

        def negated(logits, rows):
            values, metrics = loss(logits, rows)
            return -values, metrics

        return negated

    wrapped(patch, opd.objectives.likelihood, "negative_log_likelihood", positive)


def chosen_and_rejected_swapped(patch):
    def swapped(original, student, reference, **settings):
        return original(student.flip(1), reference.flip(1), **settings)

    wrapped(patch, opd.objectives.preference, "pair_loss", swapped)


# --- positions and masks


def laid_out(patch, change):
    def around(views, **settings):
        return change(views, settings)

    patch.setattr(opd.window, "lay_out", around)


def scores_one_late(patch):
    laid_out(patch, lambda views, settings: LAY_OUT(views, **{**settings, "at_labels": True}))


def scores_one_early(patch):
    def shifted(views, settings):
        layout = LAY_OUT(views, **settings)
        return replace(layout, predictors=(layout.predictors - 1).clamp(min=0))

    laid_out(patch, shifted)


def targets_one_early(patch):
    def shifted(views, settings):
        layout = LAY_OUT(views, **settings)
        return replace(layout, targets=layout.input_ids.flatten()[layout.predictors])

    laid_out(patch, shifted)


def packed_without_positions(patch):
    def leaking(views, settings):
        layout = LAY_OUT(views, **settings)
        return replace(layout, position_ids=torch.arange(layout.input_ids.shape[1]).expand_as(layout.input_ids))

    laid_out(patch, leaking)


def attention_mask_from_ids(patch):
    def masked(views, settings):
        layout = LAY_OUT(views, **settings)
        return replace(layout, attention_mask=(layout.input_ids != PAD).long())

    laid_out(patch, masked)


def stop_tokens_masked(patch):
    def endless(view):
        return TokenView(view.ids, [m and t not in STOPS for m, t in zip(view.loss_mask, view.ids, strict=True)])

    laid_out(patch, lambda views, settings: LAY_OUT([endless(view) for view in views], **settings))


def teacher_shifted(patch):
    def shifted(original, self, *arguments):
        scores = original(self, *arguments)
        return Dense(scores.hidden.roll(1, 0), scores.head)

    wrapped_method(patch, LocalTeacher, "dense", shifted)


def privileged_teacher_shifted(patch):
    def shifted(original, self, *arguments):
        scores = original(self, *arguments)
        return Dense(scores.hidden.roll(1, 0), scores.head)

    wrapped_method(patch, SelfTeacher, "score", shifted)


def teacher_logprobs_shifted(patch):
    wrapped_method(
        patch, LocalTeacher, "logprobs", lambda original, self, *a, **settings: original(self, *a, **settings).roll(1)
    )


def teacher_logprobs_without_temperature(patch):
    wrapped_method(
        patch, LocalTeacher, "logprobs", lambda original, self, *a, **settings: original(self, *a, temperature=1.0)
    )


def step_logprobs_in_wrong_columns(patch):
    def misplaced(original, self, sequences):
        original(self, sequences)
        for sequence in sequences:
            sequence.token_scores["student_logprobs"] = sequence.token_scores["student_logprobs"].roll(1)

    wrapped_method(patch, WindowBuilder, "_score", misplaced)


def groups_one_off(patch):
    def shifted(original, self, *arguments, **settings):
        view, pairs = original(self, *arguments, **settings)
        size = sum(view.loss_mask)
        return view, [(a, b, min(c + 1, size), min(d + 1, size)) for a, b, c, d in pairs]

    wrapped_method(patch, TextViews, "view", shifted)


# --- rollouts


class Wrapper:
    """A model for the sampler that is called in its own way."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)


class WithoutCache(Wrapper):
    def __call__(self, *, input_ids, attention_mask, **_):
        is_prompt = attention_mask.shape == input_ids.shape
        self._ids = input_ids if is_prompt else torch.cat([self._ids, input_ids], dim=1)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self._model(input_ids=self._ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)


class WithoutPositions(Wrapper):
    def __call__(self, *, position_ids, attention_mask, input_ids, **settings):
        end = attention_mask.shape[1]
        positions = torch.arange(end - input_ids.shape[1], end).expand_as(input_ids)
        return self._model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **settings)


class OtherWeights(Wrapper):
    def __call__(self, **settings):
        made = self._model(**settings)
        made.logits = made.logits * 1.1
        return made


def sampled_by(patch, wrapper):
    patch.setattr(opd.sources.rollouts, "causal_lm", lambda model: wrapper(causal_lm(model)))


def global_random_numbers(patch):
    patch.setattr(opd.sources.rollouts, "generator", lambda *address: np.random.default_rng(np.random.randint(2**31)))


def torch_random_numbers(patch):
    def drawing(original, seed, *address):
        torch.rand(1)
        return original(seed, *address)

    wrapped(patch, opd.sources.rollouts, "generator", drawing)


def sampled_at_temperature_one(patch):
    def hot(original, logits, shares, uniform, sampling):
        return original(logits, shares, uniform, replace(sampling, temperature=1.0))

    wrapped(patch, opd.sources.rollouts, "_draw", hot)


# --- weights


def teacher_resized(patch):
    def resized(original, self, model, *, vocab_size, **settings):
        model.resize_token_embeddings(vocab_size)
        original(self, model, vocab_size=vocab_size, **settings)

    wrapped_method(patch, LocalTeacher, "__init__", resized)


def class_patched(patch):
    def forward(self, hidden_states):
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-6)

    patch.setattr(LlamaRMSNorm, "forward", forward)


def self_teacher_trains(patch):
    patch.setattr(opd.teachers.own, "freeze", lambda model: model)


def initial_teacher_is_the_student(patch):
    patch.setattr(opd.teachers.own, "freeze", lambda model: model)
    patch.setattr(opd.teachers.own, "copy", SimpleNamespace(deepcopy=lambda model: model))


def average_is_the_student(patch):
    def shared(original, self, *arguments, **settings):
        original(self, *arguments, **settings)
        self._average = {name: parameter.data for name, parameter in self._trained()}

    wrapped_method(patch, SelfTeacher, "__init__", shared)


def adapters_without_gradient(student):
    for name, module in list(student.named_modules()):
        if name.endswith("lora_B.default") and ".layers.0." in name:
            plain = module.forward
            module.forward = lambda x, plain=plain: plain(x).detach()


def base_trains_too(student):
    for parameter in student.parameters():
        parameter.requires_grad_(True)


def nothing(patch):
    """The mistake lies in what the run is given."""


@dataclass(frozen=True)
class Mutant:
    """A mistake, where it was met, the check that tells of it or why none does, and what makes it here."""

    name: str
    met: str
    caught_by: str
    patch: Callable[[Any], None]
    variant: Any = "gkd-defaults"
    given: dict[str, Any] = field(default_factory=dict)
    uncaught: str = ""


def rows_without_loss():
    return [replace(row, completion_mask=[False] * len(row.completion_ids)) for row in make_examples()]


def rows_with_masked_ends():
    return [replace(row, completion_mask=[t not in STOPS for t in row.completion_ids]) for row in make_examples()]


HOT = {"rollout": {"temperature": 0.7}}
MUTANTS = [
    Mutant(
        "on-policy loss / dataset tokens",
        "A1",
        "gradient.loss_tokens",
        tokens_of_completions_thrown_away,
        "gkd-on_policy_forward",
    ),
    Mutant("gradient / accumulation steps", "A2", "gradient.split", divided_by_accumulation_steps),
    Mutant("loss without its temperature", "A3", "gradient.temperature", loss_without_temperature, "gkd-soft"),
    Mutant(
        "rollouts without a cache",
        "A4",
        "gradient.cache",
        lambda p: sampled_by(p, WithoutCache),
        "gkd-on_policy_forward",
    ),
    Mutant(
        "rollouts from numpy's global state",
        "A6",
        "gradient.reproducible",
        global_random_numbers,
        "reverse_kl-defaults",
    ),
    Mutant(
        "rollouts move torch's global state", "A6", "gradient.reproducible", torch_random_numbers, "reverse_kl-defaults"
    ),
    Mutant("a loss of NaN", "A10", "gradient.finite", not_finite),
    Mutant(
        "teacher resized to the student", "A11", "gradient.teacher_unchanged", teacher_resized, given={"saved": True}
    ),
    Mutant("transformers' class patched", "A12", "gradient.patched_class", class_patched),
    Mutant("teacher's scores never arrive", "A13", "gradient.teacher_matters", teacher_of_no_effect),
    Mutant("labels learnt instead of the teacher", "A13", "gradient.teacher_matters", labels_instead_of_a_teacher),
    Mutant("mean of micro-batch means", "D3", "gradient.split", mean_over_each_micro_batch),
    Mutant("scores one position late", "D4", "gradient.alignment", scores_one_late),
    Mutant("scores one position early", "D4", "gradient.alignment", scores_one_early),
    Mutant("targets one position early", "D4", "gradient.alignment", targets_one_early, "sft-defaults"),
    Mutant("teacher one position late", "D4", "gradient.alignment", teacher_shifted),
    Mutant(
        "privileged teacher one position late", "D4", "gradient.alignment", privileged_teacher_shifted, "opsd-defaults"
    ),
    Mutant(
        "teacher's log-probabilities one late",
        "D4",
        "gradient.alignment",
        teacher_logprobs_shifted,
        "reverse_kl-defaults",
    ),
    Mutant(
        "the step's log-probabilities misplaced",
        "D4",
        "gradient.alignment",
        step_logprobs_in_wrong_columns,
        "reverse_kl-defaults",
    ),
    Mutant(
        "packed rows see each other",
        "D4",
        "gradient.alignment",
        packed_without_positions,
        "dpo-defaults",
        given={"train": {"packing": True}},
    ),
    Mutant("attention mask from pad ids", "D5", "gradient.alignment", attention_mask_from_ids),
    Mutant("pad id masks the stop token", "D5", "gradient.eos", stop_tokens_masked, "sft-defaults"),
    Mutant(
        "rows whose stop token is masked",
        "D5",
        "gradient.eos",
        nothing,
        "sft-defaults",
        {"examples": rows_with_masked_ends()},
    ),
    Mutant(
        "no supervised token", "D7", "gradient.loss_tokens", nothing, "sft-defaults", {"examples": rows_without_loss()}
    ),
    Mutant("advantages of zero", "D7", "gradient.descent", advantages_of_zero, "reverse_kl-defaults"),
    Mutant("advantages that know no token", "D7", "gradient.credit", advantage_of_the_position, "reverse_kl-defaults"),
    Mutant("advantages upside down", "D24", "gradient.credit", advantages_upside_down, "reverse_kl-defaults"),
    Mutant("likelihood upside down", "D24", "gradient.direction", likelihood_upside_down, "sft-defaults"),
    Mutant("chosen and rejected swapped", "D24", "gradient.direction", chosen_and_rejected_swapped, "dpo-defaults"),
    Mutant("top-k KL without the rest", "D8", "gradient.fixed_point", top_k_without_the_rest, "gkd-top_k"),
    Mutant("divergence upside down", "D9", "gradient.bounds", loss_upside_down),
    Mutant("clip that makes a divergence negative", "D9", "gradient.bounds", nothing, CLIPPED_OPSD),
    Mutant(
        "rollouts at another temperature",
        "D12",
        "gradient.temperature",
        sampled_at_temperature_one,
        "gkd-on_policy_forward",
        HOT,
    ),
    Mutant(
        "teacher scored at another temperature",
        "D12",
        "gradient.alignment",
        teacher_logprobs_without_temperature,
        SOFT_MINILLM,
    ),
    Mutant(
        "sampler with other weights",
        "D13",
        "gradient.temperature",
        lambda p: sampled_by(p, OtherWeights),
        "reverse_kl-defaults",
    ),
    Mutant(
        "sampler counts padding as positions",
        "D13",
        "gradient.temperature",
        lambda p: sampled_by(p, WithoutPositions),
        "reverse_kl-defaults",
        {"kind": "gpt2"},
    ),
    Mutant(
        "self-teacher stays trainable", "D18", "gradient.teacher_unchanged", self_teacher_trains, "opsd-initial_teacher"
    ),
    Mutant(
        "initial teacher is the student",
        "D18",
        "gradient.teacher_unchanged",
        initial_teacher_is_the_student,
        "opsd-initial_teacher",
    ),
    Mutant(
        "averaged teacher is the student",
        "D18",
        "gradient.teacher_unchanged",
        average_is_the_student,
        "opsd-averaged_teacher",
    ),
    Mutant(
        "some adapters without gradient",
        "D18",
        "gradient.adapter",
        nothing,
        given={"lora": ADAPTER, "spoil": adapters_without_gradient},
    ),
    Mutant(
        "base trains beside the adapter",
        "D18",
        "gradient.adapter",
        nothing,
        given={"lora": ADAPTER, "spoil": base_trains_too},
    ),
    Mutant("tokens aligned with other text", "D19", "gradient.alignment", groups_one_off, "gold-defaults"),
    Mutant("forward and reverse KL swapped", "D24", "gradient.beta", other_direction, "gkd-on_policy_forward"),
]


CASES = [
    pytest.param(
        mutant,
        id=f"{mutant.met} {mutant.name}",
        marks=[pytest.mark.xfail(reason=mutant.uncaught, strict=True)] if mutant.uncaught else [],
    )
    for mutant in MUTANTS
]


@pytest.mark.parametrize("mutant", CASES)
def test_the_mistake_is_told_of(mutant, monkeypatch, tmp_path):
    given = dict(mutant.given)
    if given.pop("saved", False):
        teacher = make_model("llama", 2, 80)
        teacher.config.save_pretrained(tmp_path)
        teacher.name_or_path = str(tmp_path)
        given["models"] = {"teacher": teacher}
    mutant.patch(monkeypatch)
    told = {finding.check for finding in find(mutant.variant, **given) if finding.severity != "note"}
    assert mutant.caught_by in told if mutant.caught_by else told


# What is wrong before a weight is loaded: with rows and with pairs of models. Each gives the findings about it.


def checked(run):
    return check_data(*run)


def fewer_rows_than_a_step(folder):
    return checked(rows.loaded(folder, [rows.single(n) for n in range(3)]))


def other_ids_in_a_vocabulary_of_the_same_size(folder):
    master = pairs.trained([], texts=[text[::-1] for text in pairs.TEXTS], size=len(pairs.tokenizer()))
    return pairs.found_by(pairs.student_and_teacher(pairs.tokenizer(), master))


def prompt_that_ends_in_an_assistant_turn(folder):
    more = rows.said("assistant", "And more.")
    made = [{"messages": [*rows.single(n)["messages"], more]} for n in range(20)]
    return checked(rows.loaded(folder, made, rows.LAST_TURN))


def sequences_beyond_the_positions(folder):
    config, method, texts = rows.loaded(folder, [rows.single(n) for n in range(20)])
    try:
        check_lengths(config, texts.data, method.needs, {"model.student.path": 16})
    except ConfigError as error:
        return [Finding("config", "error", str(error))]
    return []


def prompts_cut_from_the_left(folder):
    run = rows.loaded(folder, [rows.single(n) for n in range(20)])
    return checked(rows.with_rows(run, lambda row: replace(row, prompt_ids=row.prompt_ids[-6:])))


def rows_dropped_for_their_length(folder):
    long = [rows.said("user", "x y " * 80), rows.said("assistant", "No.")]
    made = [rows.single(n) for n in range(10)] + [{"messages": long}] * 10
    return checked(rows.loaded(folder, made, limits=(100, 200)))


def ids_beyond_a_table(folder):
    readers = pairs.student_and_teacher(pairs.tokenizer(), pairs.tokenizer(), widths=(400, 300))
    return pairs.found_by(readers)


def answers_without_their_end(folder):
    run = rows.loaded(folder, [rows.single(n) for n in range(20)])
    return checked(rows.with_rows(run, lambda row: replace(row, completion_ids=row.completion_ids[:-1])))


def base_and_instruct_end_otherwise(folder):
    base, instruct = pairs.tokenizer(None, eos_token="<|endoftext|>"), pairs.tokenizer(None)
    return pairs.found_by(pairs.student_and_teacher(base, instruct))


def prompts_in_two_templates(folder):
    return pairs.found_by(pairs.student_and_teacher(pairs.tokenizer(pairs.ZEPHYR), pairs.tokenizer()))


def teachers_prompt_without_the_question(folder):
    run = rows.loaded(folder, [rows.hinted(n) for n in range(20)], rows.OPSD)

    def cut(row):
        return replace(row, teacher_prompts={"teacher": row.teacher_prompts["teacher"][-30:]})

    return checked(rows.with_rows(run, cut))


def long_answers_cut(folder):
    long = [{"messages": [rows.said("user", f"Count to {n}"), rows.said("assistant", f"{n} " * 60)]} for n in range(9)]
    return checked(rows.loaded(folder, [rows.single(n) for n in range(30)] + long, limits=(200, 50)))


def digits_cut_otherwise(folder):
    numbers = [f"{n} plus {m} is {n + m}" for n in range(100, 400, 7) for m in range(100, 400, 13)]
    whole = pairs.trained([], size=900, texts=numbers)
    single = pairs.trained([Digits(individual_digits=True)], size=300, texts=numbers)
    return pairs.found_by(pairs.student_and_teacher(single, whole), pairs.gold())


def user_turns_learnt(folder):
    run = rows.loaded(folder, [rows.two_turns(n) for n in range(20)])
    return checked(rows.with_rows(run, lambda row: replace(row, completion_mask=None)))


BEFORE_WEIGHTS = [
    ("A5", fewer_rows_than_a_step, "data.steps"),
    ("A7", other_ids_in_a_vocabulary_of_the_same_size, "pair.tokenizer"),
    ("A8", prompt_that_ends_in_an_assistant_turn, "data.open_turn"),
    ("A8", sequences_beyond_the_positions, "config"),
    ("A9", prompts_cut_from_the_left, "data.prompt_cut"),
    ("A9", rows_dropped_for_their_length, "data.dropped"),
    ("D2", ids_beyond_a_table, "pair.width"),
    ("D5", answers_without_their_end, "data.end"),
    ("D6", base_and_instruct_end_otherwise, "pair.end"),
    ("D15", prompts_in_two_templates, "pair.template"),
    ("D16", teachers_prompt_without_the_question, "data.teacher_prompt"),
    ("D17", long_answers_cut, "data.truncated"),
    ("D19", digits_cut_otherwise, "pair.digits"),
    ("D23", user_turns_learnt, "data.mask"),
]


@pytest.mark.parametrize(
    ("made", "caught_by"),
    [pytest.param(made, check, id=f"{met} {made.__name__}") for met, made, check in BEFORE_WEIGHTS],
)
def test_the_mistake_is_told_of_before_a_weight_is_loaded(made, caught_by, tmp_path):
    told = {finding.check for finding in made(tmp_path) if finding.severity != "note"}
    assert caught_by in told


def test_every_silent_mistake_of_the_first_list_stands_in_the_table():
    met = {mutant.met for mutant in MUTANTS} | {met for met, _, _ in BEFORE_WEIGHTS}
    assert {f"A{number}" for number in range(1, 14)} <= met
    assert sum(name.startswith("D") for name in met) >= 12
