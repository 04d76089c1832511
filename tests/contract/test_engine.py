"""What holds for every method in the one engine: no step knows how it was split, padded, evaluated or repeated."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

import contract.tiny
import opd.trainer
import opd.window
from contract.tiny import (
    PAD,
    STOPS,
    STUDENT_VOCAB,
    TEACHER_VOCAB,
    VOCABULARY,
    as_needed,
    asking,
    assert_same_numbers,
    distance,
    make_examples,
    make_model,
    make_models,
    make_trainer,
    some_of_the_step,
    train,
)
from contract.tokens import student_tokenizer
from contract.variants import (
    ALL_VARIANTS,
    DEFAULTS,
    NORMALIZATIONS,
    VARIANTS,
    Variant,
    changed,
    method_needs,
    needs_of,
    per_micro_batch,
    tiny_config,
)
from opd.config import LoRA
from opd.data import DataSet
from opd.data.collate import lay_out
from opd.evaluate import Evaluator, MethodLoss
from opd.methods import METHODS
from opd.models import add_lora, freeze
from opd.protocols import Example
from opd.teachers import LocalTeacher, SelfTeacher
from opd.tokenizers import Vocabulary

transformers_logging.set_verbosity_error()


def having(condition, variants=VARIANTS):
    """The variants whose needs fulfil it."""
    return [variant for variant in variants if condition(needs_of(variant))]


TAUGHT = having(lambda needs: needs.teachers)
BY_ANOTHER = having(lambda needs: any(not need.is_student for need in needs.teachers.values()))
BY_ITSELF = having(lambda needs: any(need.is_student for need in needs.teachers.values()))
BY_THE_INITIAL = having(lambda needs: any(need.model == "initial" for need in needs.teachers.values()))
HELD_BY_REFERENCE = [v for v in BY_ITSELF if not needs_of(v).privileged]
KEEPING = [v for v in VARIANTS if asking(tiny_config(v)) != tiny_config(v)]
PRECOMPUTING = having(lambda needs: any(need.precompute for need in needs.teachers.values()))
SAMPLING = having(lambda needs: needs.rollouts)
ON_DATA = having(lambda needs: needs.completions == "required" and not needs.prompt_loss)
# One variant of a method for every share of the student's rows.
MIXING = list(
    {
        (v.method, config.method.lmbda): v for v in VARIANTS if hasattr((config := tiny_config(v)).method, "lmbda")
    }.values()
)
# Options under which only teachers teach, and under which only the pair loss does; a method ignores what it has not.
NO_DATA = {"sft_on_chosen": 0.0, "sft_weight": 0.0, "dpo_weight": 0.0, "kl_penalty_weight": 0.0, "ce_weight": 0.0}
NO_DATA |= {"kd_ratio": 1.0, "whiten": False}  # whitened, rounding errors would be of size 1
ONLY_PAIRS = {"sft_on_chosen": 0.0, "sft_weight": 0.0, "adpa_weight": 0.0, "distillation_weight": 0.0}
ONLY_PAIRS |= {"kl_penalty_weight": 0.0}


def some(variants):
    """The defaults of each method in the default suite, its other variants among the slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(v, id=str(v), marks=() if v in DEFAULTS else slow) for v in variants]


def with_rows(variant, num_rows):
    """The variant with so many rows in a micro-batch."""
    return tiny_config(variant, train=per_micro_batch(variant, num_rows))


@functools.cache
def plain(variant):
    """One step of the variant as it stands."""
    return train(tiny_config(variant))


@functools.cache
def whole(variant):
    """The same with sequences that have no loss token, all in one micro-batch."""
    return train(tiny_config(variant), empties=some_of_the_step)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_step(one, other, relative=1e-6):
    """Loss, gradient and metrics of the first step; `relative` to the gradient's norm."""
    assert distance(one.gradients[0], other.gradients[0]) <= relative
    assert_same_numbers(one.named[0], other.named[0], relative)


# How a step is split


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batches(variant):
    """16, 4 and 1 rows in a micro-batch, with sequences among them that have no loss token."""
    assert_split_does_not_matter(variant, (4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_nor_on_any_other_size(variant):
    assert_split_does_not_matter(variant, (11, 8, 5, 2))


def assert_split_does_not_matter(variant, sizes):
    rows = tiny_config(variant).train.batch_size * tiny_config(variant).rollout.group_size
    assert any(sequence.num_loss_tokens == 0 for sequence in whole(variant).sequences)
    assert len(whole(variant).windows[0].batches) == 1
    for size in sizes:
        part = train(with_rows(variant, size), empties=some_of_the_step)
        assert len(part.windows[0].batches) == -(-rows // size)
        assert part.rollouts == whole(variant).rollouts
        assert_same_step(part, whole(variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_in_double_precision_only_rounding_is_left_of_the_split(variant):
    one, other = (train(with_rows(variant, n), empties=some_of_the_step, dtype=torch.float64) for n in (16, 5))
    assert_same_numbers(other.named[0], one.named[0], 1e-6)  # the logged loss has passed through float32
    kept = variant in KEEPING + PRECOMPUTING  # in float32, on disk
    assert distance(other.gradients[0], one.gradients[0]) < (1e-7 if kept else 1e-12)


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_the_order_of_the_rows_does_not_matter(variant):
    one, other = whole(variant), train(tiny_config(variant), empties=some_of_the_step, backwards=True)
    kinds = len(needs_of(variant).sequences) * tiny_config(variant).rollout.group_size
    rows = [one.rollouts[start : start + kinds] for start in range(0, len(one.rollouts), kinds)]
    assert other.rollouts == [completion for row in rows[::-1] for completion in row]
    assert_same_step(other, one)


@pytest.mark.parametrize("variant", some(having(lambda needs: needs.num_substeps == 1)))
def test_rows_without_a_loss_token_are_as_if_they_were_not_there(variant):
    """But in a mean over all sequences, which a distance between two tokenizations is."""
    config, needs = tiny_config(variant), needs_of(variant)
    size = config.train.batch_size
    fewer = size * 3 // 4
    share = 1.0 if needs.alignment is None else fewer / size
    if needs.alignment is not None:
        config = changed(config, method={"ce_weight": 0.0})
    one = train(changed(config, train={"batch_size": fewer}))
    other = train(config, empties=lambda number, kind: number >= fewer)
    assert other.losses[0] == pytest.approx(share * one.losses[0], rel=1e-6, abs=1e-7)
    assert distance(other.gradients[0], {name: share * value for name, value in one.gradients[0].items()}) < 1e-6
    mine, theirs = ({k: v for k, v in told.named[0].items() if k.startswith("train/")} for told in (one, other))
    if needs.alignment is None:
        assert_same_numbers(theirs, mine, 1e-6)


@pytest.mark.parametrize("variant", [v for v in ALL_VARIANTS if v.label == "per_sum"], ids=str)
def test_a_normalisation_divides_the_sums_of_the_sequences_by_what_it_says(variant, monkeypatch):
    """From each sequence's own sum; one has no loss token and counts in "constant" only. Each kind has its mean."""
    real, terms = opd.trainer.share_of_step, []

    def keep(made, counts):
        terms.append({term.count: float(term.weight * term.sum.detach()) for term in made.terms})
        return real(made, counts)

    def normalised(kind):
        config = changed(with_rows(variant, 1), method={"loss_normalization": kind})
        return train(config, empties=lambda number, kind: number % 16 == 3, dtype=torch.float64)

    monkeypatch.setattr(opd.trainer, "share_of_step", keep)
    told = normalised("sum")
    monkeypatch.undo()
    batches, expected = told.windows[0].batches, dict.fromkeys(("token", *NORMALIZATIONS), 0.0)
    assert len(batches) == len(terms) == 16
    for count in terms[0]:
        sums, lengths = [], []
        for batch, mine in zip(batches, terms, strict=True):
            (sequence,) = [s for s in batch.sequences if count in ("tokens", f"{s.kind}_tokens")]
            sums.append(mine[count])
            lengths.append(sequence.num_loss_tokens)
        assert lengths.count(0) == 1
        filled = [total / length for total, length in zip(sums, lengths, strict=True) if length]
        expected["sum"] += sum(sums)
        expected["token"] += sum(sums) / sum(lengths)
        expected["sequence"] += sum(filled) / len(filled)
        expected["constant"] += sum(sums) / (16 * tiny_config(variant).rollout.max_completion_tokens)
    for kind, value in expected.items():
        assert normalised(kind).losses[0] == pytest.approx(value, rel=1e-6), kind


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_the_split_does_not_matter_for_absolute_positions_sliding_windows_nor_capped_logits(variant, kind):
    one, other = (train(with_rows(variant, n), kind=kind) for n in (16, 3))
    assert other.rollouts == one.rollouts
    assert_same_step(other, one)


@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v in BY_ANOTHER and not needs_of(v).alignment], ids=str)
def test_a_student_with_the_wider_vocabulary_learns_nothing_in_the_columns_it_does_not_share(variant):
    student = make_model("llama", 1, TEACHER_VOCAB, tie_word_embeddings=False)
    config = tiny_config(variant)
    told = train(config, student=student, models=make_models(config, vocab_size=STUDENT_VOCAB))
    gradient = told.gradients[0]["lm_head.weight"]
    assert gradient[:STUDENT_VOCAB].any() and not gradient[STUDENT_VOCAB:].any()


# Padding and masks


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_positions_that_predict_a_loss_token_receive_gradient(variant):
    """The loss's gradient with respect to the last hidden states, which the logits are a linear map of."""
    student = make_model("llama", 1)
    seen = []

    def keep(module, args, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            seen.append(output.last_hidden_state)

    student.model.register_forward_hook(keep)
    told = train(tiny_config(variant), student=student, empties=some_of_the_step)
    (hidden,), (batch,) = seen, told.windows[0].batches
    expected, first = torch.zeros(hidden.shape[:2], dtype=torch.bool), 0 if needs_of(variant).label_states else 1
    for row, sequence in enumerate(batch.sequences):
        for position, counts in enumerate(sequence.student_view.loss_mask):
            if counts and position:  # nothing predicts the first token
                expected[row, position - first] = True
    received = hidden.grad.abs().amax(2) > 0
    assert not received[~expected].any()
    assert received.any()


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_neither_padding_nor_what_is_behind_the_last_loss_token_reaches_the_embeddings(variant):
    student = make_model("llama", 1)
    seen = []

    def keep(module, args, output):
        if output.requires_grad:
            output.retain_grad()
            seen.append(output)

    student.model.embed_tokens.register_forward_hook(keep)
    told = train(tiny_config(variant), student=student)
    (embedded,), (batch,) = seen, told.windows[0].batches
    for row, sequence in enumerate(batch.sequences):
        mask = sequence.student_view.loss_mask
        last = max((position for position, counts in enumerate(mask) if counts), default=0)
        assert not embedded.grad[row, last:].any()
    assert embedded.grad.any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
@pytest.mark.parametrize("pad", [17, min(STOPS)])
def test_which_id_pads_changes_not_a_bit(variant, kind, pad):
    """17 is an ordinary token; the other one is a stop token, as where pad is eos."""
    one = plain(variant) if kind == "llama" else train(tiny_config(variant), kind=kind)
    other = train(tiny_config(variant), kind=kind, vocabulary=Vocabulary(STUDENT_VOCAB, STOPS, pad))
    assert one.rollouts == other.rollouts and one.named == other.named
    assert all(torch.equal(other.gradients[0][name], value) for name, value in one.gradients[0].items())


@pytest.mark.parametrize("variant", [v for v in DEFAULTS if needs_of(v).alignment], ids=str)
def test_the_students_pad_id_need_be_no_id_of_the_teacher(variant):
    wide = {"student": make_model("llama", 1, 96), "models": make_models(tiny_config(variant), vocab_size=76)}
    one, other = (
        train(tiny_config(variant), vocabulary=Vocabulary(96, VOCABULARY.stop_ids, pad), **copy.deepcopy(wide))
        for pad in (0, 90)
    )
    assert_same_step(other, one)


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_packing_several_sequences_into_a_row_changes_nothing(variant):
    packed = train(tiny_config(variant, train={"packing": True}), empties=some_of_the_step)
    rows = packed.windows[0].batches[0].layout.input_ids.shape[0]
    assert rows < len(packed.sequences) and packed.rollouts == whole(variant).rollouts
    assert_same_step(packed, whole(variant))


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_more_padding_on_the_right_changes_nothing(variant, monkeypatch):
    def wider(views, *, pad_id, **settings):
        layout, more = lay_out(views, pad_id=pad_id, **settings), 7
        return replace(
            layout,
            input_ids=F.pad(layout.input_ids, (0, more), value=pad_id),
            attention_mask=F.pad(layout.attention_mask, (0, more)),
            predictors=layout.predictors + layout.owner * more,
        )

    one = plain(variant)
    monkeypatch.setattr(opd.window, "lay_out", wider)
    other = train(tiny_config(variant))
    width = one.windows[0].batches[0].layout.input_ids.shape[1]
    assert other.windows[0].batches[0].layout.input_ids.shape[1] == width + 7
    assert_same_step(other, one)


@pytest.mark.parametrize("pad", [PAD, min(STOPS)])
@pytest.mark.parametrize("variant", some(VARIANTS))
def test_every_token_is_attended_and_the_stop_token_is_a_target_whatever_pads(variant, pad):
    vocabulary = Vocabulary(STUDENT_VOCAB, STOPS, pad)
    (batch,) = train(tiny_config(variant), vocabulary=vocabulary).windows[0].batches
    layout, stopped = batch.layout, 0
    assert any(pad in sequence.student_view.ids for sequence in batch.sequences)
    for row, sequence in enumerate(batch.sequences):
        view = sequence.student_view
        length = len(view.ids)
        assert layout.attention_mask[row].tolist() == [1] * length + [0] * (layout.input_ids.shape[1] - length)
        targets = layout.targets[layout.owner == row].tolist()
        assert targets == [token for token, counts in zip(view.ids[1:], view.loss_mask[1:], strict=True) if counts]
        if sequence.finished:
            stopped += 1
            assert targets[-1] in STOPS
    assert stopped >= 4


@pytest.mark.parametrize("variant", some(ON_DATA))
def test_tokens_that_the_data_masks_are_neither_counted_nor_learnt(variant):
    """Another token in the place of a masked one behind the last loss token leaves the step as it was."""
    config = changed(tiny_config(variant), method={"lmbda": 0.0, "seq_kd": False})
    rows = [Example(row, [5, 6, 7], [20 + row % 3, 9, 8, 2, 4], [True, False, True, True, False]) for row in range(16)]
    others = [replace(row, completion_ids=[*row.completion_ids[:4], 50]) for row in rows]
    one, other = (train(config, examples=examples) for examples in (rows, others))
    masked = [s for s in one.sequences if s.origin == "dataset" and s.kind in ("single", "chosen")]
    assert len(masked) == 16 and all(sequence.num_loss_tokens == 3 for sequence in masked)
    assert one.metrics[0]["train/tokens"] == sum(sequence.num_loss_tokens for sequence in one.sequences)
    assert one.losses == other.losses
    assert all(torch.equal(other.gradients[0][name], value) for name, value in one.gradients[0].items())


def test_cross_entropy_equals_that_of_transformers_on_each_row_alone():
    """An oracle that knows no padding: the labels of one row, -100 where the mask is off, summed and divided once."""
    (variant,) = [variant for variant in DEFAULTS if not needs_of(variant).teachers]
    student = make_model("llama", 1)
    reference = copy.deepcopy(student)
    told = train(tiny_config(variant), student=student)
    total, count = torch.zeros(()), 0
    for sequence in told.windows[0].sequences:
        view = sequence.student_view
        labels = [token if counts else -100 for token, counts in zip(view.ids, view.loss_mask, strict=True)]
        count += sum(view.loss_mask[1:])
        logits = reference(input_ids=torch.tensor([view.ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
    (total / count).backward()
    assert told.losses[0] == pytest.approx(total.item() / count, rel=1e-6)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert distance(told.gradients[0], expected) < 1e-6


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_a_logged_mean_is_that_of_all_loss_tokens(variant):
    """What the student says of each row alone: its entropy, its likelihood of the data, and the number of tokens."""
    config, student = with_rows(variant, 3), make_model("llama", 1)
    reference = copy.deepcopy(student)
    told = train(config, student=student, empties=some_of_the_step)
    entropies, nll = [], {"single": [], "chosen": [], "rejected": [], "response": []}
    for sequence in told.sequences:
        view = sequence.student_view
        kept = torch.tensor(view.loss_mask[1:], dtype=torch.bool)
        with torch.no_grad():
            logprobs = reference(input_ids=torch.tensor([view.ids])).logits[0, :-1].log_softmax(1)[kept]
        entropies.append(-(logprobs.exp() * logprobs).sum(1))
        nll[sequence.kind].append(-logprobs.gather(1, torch.tensor(view.ids[1:])[kept][:, None]).squeeze(1))
    logged = told.metrics[0]
    assert logged["train/tokens"] == len(torch.cat(entropies))
    expected = {"train/nll": nll["single"], "train/loss_chosen_sft": nll["chosen"]}
    if config.method.model_dump().get("kd_temperature", 1.0) == 1 and config.model.teacher.top_k is None:
        expected["train/entropy"] = entropies
    for name, parts in expected.items():
        if name in logged:
            assert logged[name] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5), name
    if "train/chosen_logps" in logged:
        other = "rejected" if nll["rejected"] else "response"
        reduce = torch.mean if config.method.model_dump().get("average_log_prob") else torch.sum
        pairs = [pair for pair in zip(nll["chosen"], nll[other], strict=True) if all(map(len, pair))]
        assert 0 < len(pairs) < len(nll["chosen"])
        for name, k in (("train/chosen_logps", 0), ("train/rejected_logps", 1)):
            assert logged[name] == pytest.approx(-sum(float(reduce(p[k])) for p in pairs) / len(pairs), rel=1e-5), name


# The teachers


@pytest.mark.parametrize(
    "variant", list(dict.fromkeys([*BY_ANOTHER, *having(lambda needs: needs.privileged)])), ids=str
)
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(variant):
    """Reading what the student reads, with its weights. What the data teach beside it is left out."""
    config = changed(tiny_config(variant), method=NO_DATA)
    student, settings = make_model("llama", 1), {}
    if method_needs(config).alignment is not None:  # only text that its tokenizer writes is cut as it was sampled
        config = changed(config, method={"lmbda": 0.0})
        settings = {"tokenizer": student_tokenizer(), "examples": written_rows()}
    if method_needs(config).privileged is not None:
        settings = {"examples": [replace(e, teacher_prompts={"teacher": e.prompt_ids}) for e in make_examples()]}
    models = {key: copy.deepcopy(student) for key in make_models(config)}
    told = train(config, student=student, models=models, **settings)
    zero = [name for name in told.metrics[0] if name.endswith(NOTHING_TO_LEARN)]
    assert zero
    for name in zero:
        assert abs(told.metrics[0][name]) < 1e-5, name
    if method_needs(config).alignment is None:  # the slope of a distance of sorted probabilities is ±1 around 0
        assert told.metrics[0]["train/grad_norm"] < 1e-5 * plain(variant).metrics[0]["train/grad_norm"]


NOTHING_TO_LEARN = ("_kl", "_fkl", "advantage_mean", "advantage_std", "expected_advantage", "matched_loss")


def written_rows():
    """Rows that a tokenizer wrote: nothing in them would be cut otherwise if it were read again."""
    tokenizer, stop = student_tokenizer(), min(STOPS)
    rows = []
    for row in range(16):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (f"{row}+{90 - row}=", f"{90 + 15 * row} ab"))
        rows.append(Example(row, prompt, [*answer, stop], teacher_prompts={"teacher": prompt}))
    return rows


@pytest.mark.parametrize("variant", HELD_BY_REFERENCE, ids=str)
def test_at_the_start_a_reference_prefers_neither_answer(variant):
    """Every reward is 0 where the student still is its reference, so that the pair loss is log 2."""
    told = train(changed(tiny_config(variant), method=ONLY_PAIRS), empties=some_of_the_step)
    for name in ("reward_margin", "chosen_rewards", "rejected_rewards"):
        assert abs(told.metrics[0][f"train/{name}"]) < 1e-6, name
    assert told.losses[0] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("variant", TAUGHT, ids=str)
def test_the_teachers_get_no_gradient_and_keep_their_weights(variant):
    config = tiny_config(variant)
    models = make_models(config)
    before = {key: weights_of(model) for key, model in models.items()}
    train(config, models=models, steps=2)
    for key, model in models.items():
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert all(torch.equal(before[key][name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", BY_ITSELF, ids=str)
def test_a_teacher_made_of_the_student_is_what_it_was_at_the_start_or_is_now_or_was_on_average(variant):
    student = make_model("llama", 1)
    reference, averaged, after = copy.deepcopy(student), weights_of(student), []
    told = train(tiny_config(variant), student=student, steps=3, after_step=lambda: after.append(weights_of(student)))
    ((name, need),) = [(n, need) for n, need in needs_of(variant).teachers.items() if need.is_student]
    if need.model == "current":
        reference.load_state_dict(after[-1])
    if need.model == "ema":
        for weights in after:
            averaged = {k: need.ema_decay * v + (1 - need.ema_decay) * weights[k] for k, v in averaged.items()}
        reference.load_state_dict(averaged)
    (batch,) = told.windows[-1].batches
    view = batch.views.get(name, batch.layout)
    found = told.teachers[name].logprobs(view, batch.sequences)
    expected = LocalTeacher(freeze(reference), vocab_size=STUDENT_VOCAB).logprobs(view, batch.sequences)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(value, after[-1][name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("variant", BY_THE_INITIAL, ids=str)
def test_an_adapter_turned_off_teaches_what_a_frozen_copy_does(variant, monkeypatch):
    def adapted():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return add_lora(make_model("llama", 1), LoRA(r=4, alpha=8, dropout=0.0, targets="all-linear"))

    off = train(tiny_config(variant), student=adapted(), steps=3)
    copying = functools.partial(_copying, SelfTeacher)
    monkeypatch.setattr(contract.tiny, "SelfTeacher", copying)
    copied = train(tiny_config(variant), student=adapted(), steps=3)
    assert copied.rollouts == off.rollouts
    for one, other in zip(copied.named, off.named, strict=True):
        assert_same_numbers(one, other, 1e-6)
    assert all(distance(one, other) < 1e-5 for one, other in zip(copied.gradients, off.gradients, strict=True))


def _copying(kind, *args, **settings):
    return kind(*args, **{**settings, "fresh_adapter": False})


@pytest.mark.parametrize("variant", [*KEEPING, *PRECOMPUTING], ids=str)
def test_what_teachers_said_before_training_teaches_what_they_say_during_it(variant):
    kept = tiny_config(variant)
    live = changed(asking(kept), method={"precompute_reference": False})
    one, other = (train(config, steps=3) for config in (kept, live))
    for mine, theirs in zip(one.named, other.named, strict=True):
        assert_same_numbers(mine, theirs, 1e-5)
    assert distance(one.gradients[0], other.gradients[0]) < 1e-5


# Options and wrappers


@functools.cache
def losses_of(variant):
    return train(tiny_config(variant), steps=2).losses


@pytest.mark.parametrize("variant", some([v for v in SAMPLING if v not in ON_DATA]))
def test_completions_that_the_method_does_not_use_do_not_normalise_its_loss(variant):
    """The count is that of the sequences trained on: TRL's GKD counts the data's completions, thrown away or not."""
    short, long = ([Example(row, [5 + row], [9] * length) for row in range(16)] for length in (1, 40))
    one, other = (train(tiny_config(variant), examples=examples) for examples in (short, long))
    assert one.named == other.named


@pytest.mark.parametrize("variant", [v for v in ALL_VARIANTS if v.overrides], ids=str)
def test_no_option_is_without_effect(variant):
    """It changes the losses, or what the method asks of the rows."""
    plain = variant.overrides[:-1] if variant not in VARIANTS else ()
    defaults = Variant(variant.method, "defaults", plain)
    if needs_of(variant) == needs_of(defaults):
        assert train(tiny_config(variant), steps=2).losses != losses_of(defaults)


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_checkpointing_activations_changes_nothing(variant):
    student = make_model("llama", 1)
    student.gradient_checkpointing_enable()
    assert_same_step(train(tiny_config(variant), student=student), plain(variant))


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_adapters_learn_alone_and_do_not_know_the_split(variant):
    told = []
    for num_rows in (16, 3):
        student = make_model("llama", 1)
        before = weights_of(student)
        adapted = add_lora(student, LoRA(r=4, alpha=8, dropout=0.0, targets="all-linear"))
        told.append(train(with_rows(variant, num_rows), student=adapted))
        after = {name.replace("base_layer.", ""): value for name, value in student.state_dict().items()}
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("lora" in name for name in told[0].gradients[0])
    assert_same_step(told[1], told[0])


# Time and chance


class Spelling:
    """A tokenizer that can only read ids out."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_evaluating_after_every_step_does_not_change_training(variant):
    config, student, results = tiny_config(variant), make_model("llama", 1), []
    needs, rows = needs_of(variant), [as_needed(example, needs_of(variant)) for example in make_examples()]
    is_offline = not needs.rollouts and "response" not in needs.sequences
    trainer, watched = make_trainer(
        config,
        student=student,
        steps=3,
        after_step=lambda: results.append((evaluator(student), evaluator(student))),
    )
    evaluator = Evaluator(
        config,
        DataSet(rows, rows[:6], lambda example, text, finished: {"finished": float(finished)}),
        tokenizer=Spelling(),
        vocabulary=VOCABULARY,
        teacher=LocalTeacher(freeze(make_model("llama", 2, TEACHER_VOCAB)), vocab_size=STUDENT_VOCAB),
        objective=MethodLoss(config, trainer.method, VOCABULARY, watched.source, watched.teachers, torch.device("cpu"))
        if is_offline
        else None,
    )
    trainer.train()
    alone = train(config, steps=3)
    assert watched.losses == alone.losses and watched.rollouts == alone.rollouts
    assert len(results) == 3 and all(first == second for first, second in results)
    assert {"forward_kl", "reverse_kl", "nll"} <= results[0][0][0].keys()
    assert ("loss" in results[0][0][0]) == is_offline
    assert results[0][0][0] != results[2][0][0]


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_a_seed_gives_the_same_training_to_the_bit_and_another_seed_gives_another(variant):
    one, again, other = (train(tiny_config(variant, run={"seed": seed}), steps=3) for seed in (0, 0, 1))
    assert one.named == again.named and one.rollouts == again.rollouts
    assert all(torch.equal(value, again.student.state_dict()[name]) for name, value in one.student.state_dict().items())
    assert one.losses != other.losses and one.rollouts != other.rollouts


@pytest.mark.parametrize("variant", some(SAMPLING))
def test_another_seed_samples_other_completions_of_the_same_prompts(variant):
    def sampled(seed):
        told = train(tiny_config(variant, run={"seed": seed}), steps=3)
        return {(s.row, s.member): s.completion_ids for s in told.sequences if s.origin != "dataset"}

    one, other = sampled(0), sampled(1)
    shared = one.keys() & other.keys()
    assert len(shared) >= 4
    assert sum(one[key] != other[key] for key in shared) > 0.8 * len(shared)


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_a_step_without_a_loss_token_leaves_the_weights_as_they_are(variant):
    """The second of three steps is empty; the optimizer already has momentum, and weight decay is on."""
    config = tiny_config(variant, train={"weight_decay": 0.1})
    student, kept = make_model("llama", 1), []
    size = config.train.batch_size
    told = train(
        config,
        student=student,
        steps=3,
        empties=lambda number, kind: number // size == 1,
        after_step=lambda: kept.append(weights_of(student)),
    )
    assert told.losses[1] == 0 and told.metrics[1]["train/tokens"] == 0
    assert all(math.isfinite(value) for record in told.metrics for value in record.values())
    assert all(torch.equal(kept[0][name], value) for name, value in kept[1].items())
    assert not all(torch.equal(kept[1][name], value) for name, value in kept[2].items())


@pytest.mark.parametrize("variant", some(VARIANTS))
def test_twenty_steps_lower_the_objective(variant):
    config = tiny_config(variant)
    if needs_of(variant).alignment is not None:  # sampled texts differ more in how they are cut than in what is learnt
        config = changed(config, method={"lmbda": 0.0})
    told = train(config, steps=20, examples=make_examples(16))
    values = [record[variant.entry.falls] for record in told.metrics]
    assert sum(values[-4:]) < variant.entry.falls_to * sum(values[:4])


@pytest.mark.parametrize("variant", MIXING, ids=str)
def test_the_share_of_the_students_rows_is_lambda_and_does_not_depend_on_the_split(variant):
    share, steps = tiny_config(variant).method.lmbda, 12
    one, other = (
        train(changed(with_rows(variant, n), rollout={"max_completion_tokens": 1}), steps=steps) for n in (16, 5)
    )
    origins, others = (
        [[sequence.origin for sequence in window.sequences] for window in told.windows] for told in (one, other)
    )
    assert origins == others
    flat = [origin for window in origins for origin in window]
    drawn = sum(origin == "student" for origin in flat) / len(flat)
    assert abs(drawn - share) <= 4 * math.sqrt(share * (1 - share) / len(flat))
    assert [record["rollout/on_policy"] for record in one.metrics] == [w.count("student") / len(w) for w in origins]


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_every_row_is_seen_once_a_pass_whatever_the_batch_size(variant):
    for size in (4, 12):
        config = tiny_config(variant, train={"batch_size": size, "micro_batch_size": 6})
        told = train(config, steps=48 // size)
        rows = [sequence.row for sequence in told.sequences]
        each = config.rollout.group_size * len(needs_of(variant).sequences)
        assert sorted(rows) == sorted(list(range(48)) * each)


@pytest.mark.parametrize("variant", some(SAMPLING))
def test_the_samplers_settings_do_not_touch_the_loss(variant):
    """Greedy rollouts of both runs are the same, whatever top_p and top_k; so then is all that follows."""
    one = train(tiny_config(variant, rollout={"temperature": 0.0}))
    other = train(tiny_config(variant, rollout={"temperature": 0.0, "top_p": 0.5, "top_k": 3}))
    assert one.named == other.named


def test_no_room_but_that_of_the_methods_holds_a_methods_name():
    opd_folder = Path(opd.window.__file__).parent
    rooms = [
        *map(opd_folder.joinpath, ROOMS),
        *(f for d in ("sources", "teachers") for f in (opd_folder / d).glob("*.py")),
    ]
    for room in rooms:
        text = room.read_text(encoding="utf-8")
        assert not [method for method in METHODS if f'"{method}"' in text], room


ROOMS = (
    "trainer.py",
    "window.py",
    "loading.py",
    "precompute.py",
    "pipeline.py",
    "stages.py",
    "recorder.py",
)


def test_a_window_of_another_number_of_micro_batches_is_refused(monkeypatch):
    from opd.errors import RunError

    trainer, _ = make_trainer(tiny_config(DEFAULTS[0]), student=make_model("llama", 1))
    real = trainer.windows.__class__.__call__

    def short(self, step):
        window = real(self, step)
        window.batches.append(window.batches[0])
        return window

    monkeypatch.setattr(trainer.windows.__class__, "__call__", short)
    with pytest.raises(RunError, match="micro-batches"):
        trainer.train()
