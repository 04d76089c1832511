"""What holds for every method in the one engine: no step knows how it was split, padded, evaluated or repeated."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

import opd.window
from contract.tiny import (
    PAD,
    STOPS,
    STUDENT_VOCAB,
    TEACHER_VOCAB,
    VOCABULARY,
    assert_same_numbers,
    distance,
    fourth_of_the_step,
    make_examples,
    make_model,
    make_trainer,
    train,
)
from contract.variants import ALL_VARIANTS, VARIANTS, Variant, tiny_config
from opd.config import LoRA
from opd.data import DataSet
from opd.data.collate import lay_out
from opd.evaluate import Evaluator
from opd.methods import METHODS
from opd.models import Vocabulary, add_lora
from opd.protocols import Example, Layout
from opd.teachers import LocalTeacher
from opd.trainer import DistillationTrainer

transformers_logging.set_verbosity_error()

DEFAULTS = [variant for variant in VARIANTS if variant.label == "defaults"]


def needs_of(variant):
    return METHODS[variant.method](tiny_config(variant).method).needs


TAUGHT = [variant for variant in VARIANTS if needs_of(variant).teachers]
SAMPLING = [variant for variant in VARIANTS if needs_of(variant).rollouts]
ON_DATA = [variant for variant in VARIANTS if needs_of(variant).completions == "required"]
# One variant for every share of the student's rows.
MIXING = list(
    {config.method.lmbda: v for v in VARIANTS if hasattr((config := tiny_config(v)).method, "lmbda")}.values()
)


def split(size):
    return {"micro_batch_size": size}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_step(one, other, relative=1e-6):
    """Loss, gradient and metrics of the first step; `relative` to the gradient's norm."""
    assert one.rollouts == other.rollouts
    assert distance(one.gradients[0], other.gradients[0]) <= relative
    assert_same_numbers(one.named[0], other.named[0], relative)


# How a step is split


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batches(variant):
    """16x1, 8x2, 4x4 and 1x16, with a sequence in it that has no loss token."""
    whole, *parts = [
        train(tiny_config(variant, train=split(size)), empties=fourth_of_the_step) for size in (16, 8, 4, 1)
    ]
    assert any(sequence.num_loss_tokens == 0 for sequence in whole.windows[0].sequences)
    assert len(parts[-1].windows[0].batches) == 16
    for part in parts:
        assert_same_step(part, whole)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_in_double_precision_only_rounding_is_left_of_the_split(variant):
    whole, part = (
        train(tiny_config(variant, train=split(size)), empties=fourth_of_the_step, dtype=torch.float64)
        for size in (16, 5)
    )
    assert_same_numbers(part.named[0], whole.named[0], 1e-6)  # the logged loss has passed through float32
    assert distance(part.gradients[0], whole.gradients[0]) < 1e-12


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_a_normalisation_divides_the_sums_of_the_sequences_by_what_it_says(variant, monkeypatch):
    """From each sequence's own sum; one has no loss token and counts in "constant" only."""
    real, sums = DistillationTrainer.compute_loss, []

    def keep(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        sums.append(float(loss.detach()))
        return loss

    def normalised(kind):
        changed = {"loss_normalization": kind}
        config = tiny_config(variant, method=changed, train=split(1))
        return train(config, empties=fourth_of_the_step, dtype=torch.float64)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", keep)
    told = normalised("sum")
    monkeypatch.undo()
    lengths = [sequence.num_loss_tokens for sequence in told.windows[0].sequences]
    assert len(sums) == len(lengths) == 16 and lengths.count(0) == 1
    filled = [total / length for total, length in zip(sums, lengths, strict=True) if length]
    expected = {
        "sum": sum(sums),
        "token": sum(sums) / sum(lengths),
        "sequence": sum(filled) / len(filled),
        "constant": sum(sums) / (16 * tiny_config(variant).rollout.max_completion_tokens),
    }
    for kind, value in expected.items():
        assert normalised(kind).losses[0] == pytest.approx(value, rel=1e-6), kind


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_the_split_does_not_matter_for_absolute_positions_sliding_windows_nor_capped_logits(variant, kind):
    whole, part = (train(tiny_config(variant, train=split(size)), kind=kind) for size in (16, 3))
    assert_same_step(part, whole)


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_a_student_with_the_wider_vocabulary_learns_nothing_in_the_columns_it_does_not_share(variant):
    student = make_model("llama", 1, TEACHER_VOCAB, tie_word_embeddings=False)
    told = train(tiny_config(variant), student=student, teacher=make_model("llama", 2, STUDENT_VOCAB))
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
    told = train(tiny_config(variant), student=student, empties=fourth_of_the_step)
    (hidden,), (batch,) = seen, told.windows[0].batches
    expected = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for row, sequence in enumerate(batch.sequences):
        for k, counts in enumerate(sequence.completion_mask):
            expected[row, len(sequence.prompt_ids) + k - 1] = counts
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
    one = train(tiny_config(variant), kind=kind)
    other = train(tiny_config(variant), kind=kind, vocabulary=Vocabulary(STUDENT_VOCAB, STOPS, pad))
    assert one.rollouts == other.rollouts and one.named == other.named
    assert all(torch.equal(other.gradients[0][name], value) for name, value in one.gradients[0].items())


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_more_padding_on_the_right_changes_nothing(variant, monkeypatch):
    def wider(views, *, pad_id, device="cpu"):
        layout = lay_out(views, pad_id=pad_id, device=device)
        width, more = layout.input_ids.shape[1], 7
        return (
            Layout(
                F.pad(layout.input_ids, (0, more), value=pad_id),
                F.pad(layout.attention_mask, (0, more)),
                layout.predictors + layout.owner * more,
                layout.targets,
                layout.owner,
            )
            if width
            else layout
        )

    one = train(tiny_config(variant))
    monkeypatch.setattr(opd.window, "lay_out", wider)
    other = train(tiny_config(variant))
    width = one.windows[0].batches[0].layout.input_ids.shape[1]
    assert other.windows[0].batches[0].layout.input_ids.shape[1] == width + 7
    assert_same_step(other, one)


@pytest.mark.parametrize("pad", [PAD, min(STOPS)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_token_is_attended_and_the_stop_token_is_a_target_whatever_pads(variant, pad):
    vocabulary = Vocabulary(STUDENT_VOCAB, STOPS, pad)
    (batch,) = train(tiny_config(variant), vocabulary=vocabulary).windows[0].batches
    layout, stopped = batch.layout, 0
    assert any(pad in sequence.prompt_ids for sequence in batch.sequences)
    for row, sequence in enumerate(batch.sequences):
        length = len(sequence.prompt_ids) + len(sequence.completion_ids)
        assert layout.attention_mask[row].tolist() == [1] * length + [0] * (layout.input_ids.shape[1] - length)
        targets = layout.targets[layout.owner == row].tolist()
        counted = zip(sequence.completion_ids, sequence.completion_mask, strict=True)
        assert targets == [token for token, counts in counted if counts]
        if sequence.finished:
            stopped += 1
            assert targets[-1] in STOPS
    assert stopped >= 4


@pytest.mark.parametrize("variant", ON_DATA, ids=str)
def test_tokens_that_the_data_masks_are_neither_counted_nor_learnt(variant):
    """Another token in the place of a masked one behind the last loss token leaves the step as it was."""
    config = tiny_config(variant)
    if config.method.model_dump().get("lmbda", 0.0) > 0:
        config = config.model_copy(update={"method": config.method.model_copy(update={"lmbda": 0.0, "seq_kd": False})})
    rows = [Example(row, [5, 6, 7], [20 + row, 9, 8, 3, 4], [True, False, True, True, False]) for row in range(16)]
    others = [Example(row.row, row.prompt_ids, [*row.completion_ids[:4], 50], row.completion_mask) for row in rows]
    one, other = (train(config, examples=examples) for examples in (rows, others))
    assert one.metrics[0]["train/tokens"] == 3 * 16
    assert one.losses == other.losses
    assert all(torch.equal(other.gradients[0][name], value) for name, value in one.gradients[0].items())


def test_cross_entropy_equals_that_of_transformers_on_each_row_alone():
    """An oracle that knows no padding: the labels of one row, -100 where the mask is off, summed and divided once."""
    (variant,) = [variant for variant in ALL_VARIANTS if variant in DEFAULTS and not needs_of(variant).teachers]
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


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_logged_mean_is_that_of_all_loss_tokens(variant):
    """The student's entropy and the number of tokens, from the logits of each row alone."""
    student = make_model("llama", 1)
    reference = copy.deepcopy(student)
    told = train(tiny_config(variant, train=split(3)), student=student, empties=fourth_of_the_step)
    entropies = []
    for view in (sequence.student_view for sequence in told.windows[0].sequences):
        with torch.no_grad():
            logprobs = reference(input_ids=torch.tensor([view.ids])).logits[0, :-1].log_softmax(1)
        entropies.append(-(logprobs.exp() * logprobs).sum(1)[torch.tensor(view.loss_mask[1:], dtype=torch.bool)])
    tokens = torch.cat(entropies)
    temperature = tiny_config(variant).method.model_dump().get("kd_temperature", 1.0)
    assert told.metrics[0]["train/tokens"] == len(tokens)
    if temperature == 1 and tiny_config(variant).model.teacher.top_k is None:
        assert told.metrics[0]["train/entropy"] == pytest.approx(tokens.mean().item(), rel=1e-5)


# The teacher


@pytest.mark.parametrize("variant", TAUGHT, ids=str)
def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(variant):
    student = make_model("llama", 1)
    told = train(tiny_config(variant), student=student, teacher=copy.deepcopy(student))
    zero = [name for name in told.metrics[0] if name.endswith(("_kl", "advantage_mean", "advantage_std"))]
    assert zero
    for name in zero:
        assert abs(told.metrics[0][name]) < 1e-6, name
    taught = train(tiny_config(variant))
    assert told.metrics[0]["train/grad_norm"] < 1e-5 * taught.metrics[0]["train/grad_norm"]


@pytest.mark.parametrize("variant", TAUGHT, ids=str)
def test_the_teacher_gets_no_gradient_and_keeps_its_weights(variant):
    teacher = make_model("llama", 2, TEACHER_VOCAB)
    before = weights_of(teacher)
    train(tiny_config(variant), teacher=teacher, steps=3)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


# Options and wrappers


@functools.cache
def losses_of(variant):
    return train(tiny_config(variant), steps=2).losses


@pytest.mark.parametrize("variant", [v for v in SAMPLING if v not in ON_DATA], ids=str)
def test_completions_that_the_method_does_not_use_do_not_normalise_its_loss(variant):
    """The count is that of the sequences trained on: TRL's GKD counts the data's completions, thrown away or not."""
    short, long = ([Example(row, [5 + row], [9] * length) for row in range(16)] for length in (1, 40))
    one, other = (train(tiny_config(variant), examples=examples) for examples in (short, long))
    assert one.named == other.named


@pytest.mark.parametrize("variant", [v for v in ALL_VARIANTS if v.overrides], ids=str)
def test_no_option_is_without_effect(variant):
    """It changes the losses, or what the method asks of the rows."""
    defaults = Variant(variant.method, "defaults")
    if needs_of(variant) == needs_of(defaults):
        assert train(tiny_config(variant), steps=2).losses != losses_of(defaults)


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_checkpointing_activations_changes_nothing(variant):
    student = make_model("llama", 1)
    student.gradient_checkpointing_enable()
    assert_same_step(train(tiny_config(variant), student=student), train(tiny_config(variant)))


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_adapters_learn_alone_and_do_not_know_the_split(variant):
    told = []
    for size in (16, 3):
        student = make_model("llama", 1)
        before = weights_of(student)
        adapted = add_lora(student, LoRA(r=4, alpha=8, dropout=0.0, targets="all-linear"))
        told.append(train(tiny_config(variant, train=split(size)), student=adapted))
        after = {name.replace("base_layer.", ""): value for name, value in student.state_dict().items()}
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("lora" in name for name in told[0].gradients[0])
    assert_same_step(told[1], told[0])


# Time and chance


class Spelling:
    """A tokenizer that can only read ids out."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_evaluating_after_every_step_does_not_change_training(variant):
    config = tiny_config(variant)
    rows = make_examples()
    student, teacher = make_model("llama", 1), make_model("llama", 2, TEACHER_VOCAB)
    evaluator = Evaluator(
        config,
        DataSet(rows, rows[:6], lambda example, text, finished: {"finished": float(finished)}),
        tokenizer=Spelling(),
        vocabulary=VOCABULARY,
        teacher=LocalTeacher(teacher, vocab_size=STUDENT_VOCAB),
    )
    results = []
    watched = train(
        config,
        steps=3,
        student=student,
        teacher=teacher,
        after_step=lambda: results.append((evaluator(student), evaluator(student))),
    )
    alone = train(config, steps=3)
    assert watched.losses == alone.losses and watched.rollouts == alone.rollouts
    assert len(results) == 3 and all(first == second for first, second in results)
    assert {"forward_kl", "reverse_kl", "loss"} <= results[0][0][0].keys()
    assert results[0][0][0] != results[2][0][0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_seed_gives_the_same_training_to_the_bit_and_another_seed_gives_another(variant):
    one, again, other = (train(tiny_config(variant, run={"seed": seed}), steps=3) for seed in (0, 0, 1))
    assert one.named == again.named and one.rollouts == again.rollouts
    assert all(torch.equal(value, again.student.state_dict()[name]) for name, value in one.student.state_dict().items())
    assert one.losses != other.losses and one.rollouts != other.rollouts


@pytest.mark.parametrize("variant", SAMPLING, ids=str)
def test_another_seed_samples_other_completions_of_the_same_prompts(variant):
    def sampled(seed):
        told = train(tiny_config(variant, run={"seed": seed}), steps=3)
        sequences = [sequence for window in told.windows for sequence in window.sequences]
        return {(s.row, s.member): s.completion_ids for s in sequences if s.origin != "dataset"}

    one, other = sampled(0), sampled(1)
    shared = one.keys() & other.keys()
    assert len(shared) >= 4
    assert sum(one[key] != other[key] for key in shared) > 0.8 * len(shared)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_step_without_a_loss_token_leaves_the_weights_as_they_are(variant):
    """The second of three steps is empty; the optimizer already has momentum, and weight decay is on."""
    config = tiny_config(variant, train={"weight_decay": 0.1})
    student, kept = make_model("llama", 1), []
    size = config.train.batch_size
    told = train(
        config,
        student=student,
        steps=3,
        empties=lambda number: number // size == 1,
        after_step=lambda: kept.append(weights_of(student)),
    )
    assert told.losses[1] == 0 and told.metrics[1]["train/tokens"] == 0
    assert all(math.isfinite(value) for record in told.metrics for value in record.values())
    assert all(torch.equal(kept[0][name], value) for name, value in kept[1].items())
    assert not all(torch.equal(kept[1][name], value) for name, value in kept[2].items())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_twenty_steps_lower_the_objective(variant):
    told = train(tiny_config(variant), steps=20, examples=make_examples(16))
    values = [record[variant.objective] for record in told.metrics]
    assert sum(values[-4:]) < 0.8 * sum(values[:4])


@pytest.mark.parametrize("variant", MIXING, ids=str)
def test_the_share_of_the_students_rows_is_lambda_and_does_not_depend_on_the_split(variant):
    share, steps = tiny_config(variant).method.lmbda, 12
    one, other = (
        train(tiny_config(variant, train=split(size), rollout={"max_completion_tokens": 1}), steps=steps)
        for size in (16, 5)
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
        rows = [sequence.row for window in told.windows for sequence in window.sequences]
        group = config.rollout.group_size
        assert sorted(rows) == sorted(list(range(48)) * group)


@pytest.mark.parametrize("variant", SAMPLING, ids=str)
def test_the_samplers_settings_do_not_touch_the_loss(variant):
    """Greedy rollouts of both runs are the same, whatever top_p and top_k; so then is all that follows."""
    one = train(tiny_config(variant, rollout={"temperature": 0.0}))
    other = train(tiny_config(variant, rollout={"temperature": 0.0, "top_p": 0.5, "top_k": 3}))
    assert one.named == other.named


def test_neither_engine_nor_window_nor_sources_hold_a_methods_name():
    for room in ("trainer.py", "window.py", "sources/__init__.py", "sources/rollouts.py", "teachers/local.py"):
        text = (Path(opd.window.__file__).parent / room).read_text(encoding="utf-8")
        assert not [method for method in METHODS if f'"{method}"' in text]


def test_a_window_of_another_number_of_micro_batches_is_refused(monkeypatch):
    from opd.errors import RunError

    trainer, _ = make_trainer(tiny_config(DEFAULTS[0]), student=make_model("llama", 1), teacher=make_model("llama", 2))
    real = trainer.windows.__class__.__call__

    def short(self, step):
        window = real(self, step)
        window.batches.append(window.batches[0])
        return window

    monkeypatch.setattr(trainer.windows.__class__, "__call__", short)
    with pytest.raises(RunError, match="micro-batches"):
        trainer.train()
