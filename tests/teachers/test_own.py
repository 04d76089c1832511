"""The student as its own teacher: as it is, as it was, and averaged, against closed forms and frozen copies."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.tiny import PAD, STUDENT_VOCAB, make_examples, make_model

from opd.config import Hardware, LoRA
from opd.data.collate import lay_out
from opd.models import add_lora, attach_objective, computing, predicting_states, read_head
from opd.objectives import divergence_loss, policy_gradient_loss, sum_over_tokens, token_logprobs
from opd.protocols import Dense, TokenView
from opd.teachers import SelfTeacher

DECAY = 0.75
LORA = LoRA(r=2, alpha=4, dropout=0.5, targets="all-linear")


def hardware(precision="fp32"):
    return Hardware(name="test", device="cpu", nodes=1, processes_per_node=1, precision=precision, threads=1)


def self_teacher(student, mode, *, precision="fp32", **settings):
    return SelfTeacher(student, mode, vocab_size=STUDENT_VOCAB, hardware=hardware(precision), **settings)


def with_adapter(base, *, trained=True):
    torch.manual_seed(3)
    student = add_lora(base, LORA)
    if trained:
        train(student, steps=3)
    return student


def train(student, steps=1):
    """Moves every trained weight, by a random step of its own."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _ in range(steps):
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.fixture
def layout():
    views = [
        TokenView(row.prompt_ids + row.completion_ids, [False] * len(row.prompt_ids) + [True] * len(row.completion_ids))
        for row in make_examples(5)
    ]
    return lay_out(views, pad_id=PAD)


def expected(model, layout):
    """log p of the targets by transformers' own forward and torch's log_softmax."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=layout.input_ids, attention_mask=layout.attention_mask).logits.float()
    logprobs = logits.flatten(0, 1)[layout.predictors].log_softmax(1)
    return logprobs.gather(1, layout.targets[:, None])[:, 0]


def logprobs_of(teacher, layout, precision="fp32"):
    """The teacher's answer; that its distributions say the same is checked on the way."""
    logprobs, dense = teacher.logprobs(layout, []), teacher.score(layout, [])
    with torch.no_grad(), computing(hardware(precision)):  # as the loss, which is computed in the student's forward
        torch.testing.assert_close(token_logprobs(dense, layout.targets), logprobs)
    assert not logprobs.requires_grad and not dense.hidden.requires_grad and not dense.head.weight.requires_grad
    return logprobs


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_untouched(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_current_student_scores_what_the_student_would(layout):
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "current")
    for _ in range(2):
        torch.testing.assert_close(logprobs_of(teacher, layout), expected(student, layout))
        train(student)


@pytest.mark.parametrize("adapter", [None, "continued"])
def test_the_initial_student_stays_what_it_was_while_the_student_trains(layout, adapter):
    student = make_model("llama", seed=1)
    if adapter:
        student = with_adapter(student)
    before = expected(copy.deepcopy(student), layout)
    teacher = self_teacher(student, "initial")
    torch.testing.assert_close(logprobs_of(teacher, layout), before)
    train(student)
    teacher.after_step()
    torch.testing.assert_close(logprobs_of(teacher, layout), before)
    assert not torch.allclose(expected(student, layout), before, atol=1e-2)


def test_the_base_under_a_fresh_adapter_is_a_frozen_copy_of_the_student(layout):
    base = make_model("llama", seed=1)
    before = expected(copy.deepcopy(base), layout)
    student = with_adapter(base, trained=False)
    teacher = self_teacher(student, "initial", fresh_adapter=True)
    for _ in range(2):
        torch.testing.assert_close(logprobs_of(teacher, layout), before)
        train(student)
    # Afterwards the student has its adapter again, and nothing else to train.
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not torch.allclose(expected(student, layout), before, atol=1e-2)


def test_a_fresh_adapter_costs_no_second_model():
    student = with_adapter(make_model("llama", seed=1), trained=False)
    own = {id(parameter) for parameter in student.parameters()}
    teacher = self_teacher(student, "initial", fresh_adapter=True)
    assert {id(parameter) for parameter in teacher._model.parameters()} == own


@pytest.mark.parametrize("adapter", [False, True])
def test_the_average_is_the_exponential_one_of_the_weights_after_every_step(layout, adapter):
    student = make_model("llama", seed=1)
    if adapter:
        student = with_adapter(student)
    teacher = self_teacher(student, "ema", ema_decay=DECAY)
    history = [weights(student)]
    for _ in range(4):
        train(student)
        teacher.after_step()
        history.append(weights(student))
    averaged = copy.deepcopy(student)
    # w_k = d^k s_0 + (1 - d) Σ_{i=1..k} d^(k-i) s_i
    factors = [DECAY**4, *((1 - DECAY) * DECAY ** (4 - i) for i in range(1, 5))]
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            parameter.copy_(sum(factor * step[name] for factor, step in zip(factors, history, strict=True)))
    torch.testing.assert_close(logprobs_of(teacher, layout), expected(averaged, layout))
    assert_untouched(student, history[-1])


def test_the_student_has_its_weights_back_when_scoring_fails(layout):
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "ema", ema_decay=DECAY)
    train(student)
    before = weights(student)
    layout.input_ids[0, 0] = STUDENT_VOCAB  # no such id
    with pytest.raises(IndexError):
        teacher.score(layout, [])
    assert_untouched(student, before)


def test_the_average_keeps_what_it_scored_when_the_student_trains_on(layout):
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "ema", ema_decay=DECAY)
    before, scores = expected(copy.deepcopy(student), layout), teacher.score(layout, [])
    train(student)
    torch.testing.assert_close(token_logprobs(scores, layout.targets), before)


def test_a_saved_average_goes_on_where_it_was(tmp_path, layout, monkeypatch):
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "ema", ema_decay=DECAY)
    train(student)
    teacher.after_step()
    teacher.save(tmp_path)
    wanted = logprobs_of(teacher, layout)
    again = self_teacher(copy.deepcopy(student), "ema", ema_decay=DECAY)  # begins at the trained weights
    assert not torch.allclose(logprobs_of(again, layout), wanted, atol=1e-3)
    again.load(tmp_path)
    assert torch.equal(logprobs_of(again, layout), wanted)
    monkeypatch.setenv("RANK", "1")
    other = tmp_path / "other"
    other.mkdir()
    again.save(other)
    assert not list(other.iterdir())


@pytest.mark.parametrize("mode", ["current", "initial"])
def test_only_an_average_takes_room_in_a_checkpoint(tmp_path, mode):
    teacher = self_teacher(make_model("llama", seed=1), mode)
    teacher.save(tmp_path)
    teacher.load(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "fresh"), [("current", False), ("initial", True), ("initial", False), ("ema", False)])
def test_an_adapters_dropout_is_off_while_scoring_and_on_again_behind(layout, mode, fresh):
    student = with_adapter(make_model("llama", seed=1), trained=not fresh).train()
    teacher = self_teacher(student, mode, fresh_adapter=fresh)
    assert torch.equal(logprobs_of(teacher, layout), logprobs_of(teacher, layout))
    dropouts = [module for module in student.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert dropouts and all(module.training for module in dropouts)


@pytest.mark.parametrize("mode", ["current", "initial", "ema"])
def test_before_the_first_step_every_mode_says_to_the_bit_what_the_student_says(layout, mode):
    """A reference in another precision than the policy would give a margin where there is none."""
    student = make_model("llama", seed=1).train()
    teacher = self_teacher(student, mode, precision="bf16")
    logprobs = logprobs_of(teacher, layout, "bf16")
    with torch.no_grad(), computing(hardware("bf16")):
        hidden = student.base_model(layout.input_ids, attention_mask=layout.attention_mask).last_hidden_state
        hidden = hidden.flatten(0, 1)[layout.predictors]
        own = token_logprobs(type(teacher.score(layout, []))(hidden, read_head(student)), layout.targets)
    assert torch.equal(logprobs, own)
    assert not torch.allclose(logprobs, expected(student, layout), atol=1e-4)  # it was computed in bfloat16


def test_an_average_is_scored_with_its_own_weights_where_autocast_has_cached_the_students(layout):
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "ema", precision="bf16", ema_decay=DECAY)
    train(student, steps=3)
    wanted = logprobs_of(teacher, layout, "bf16")
    with torch.no_grad(), computing(hardware("bf16")):  # as evaluation does
        own = student(input_ids=layout.input_ids, attention_mask=layout.attention_mask).logits
        assert torch.equal(logprobs_of(teacher, layout, "bf16"), wanted)
        assert torch.equal(student(input_ids=layout.input_ids, attention_mask=layout.attention_mask).logits, own)


@pytest.mark.parametrize("mode", ["current", "initial", "ema"])
def test_scoring_leaves_the_students_gradient_what_it_is(layout, mode):
    student = make_model("llama", seed=1)
    attach_objective(student)
    teacher = self_teacher(student, mode, precision="bf16")

    def gradient(*, asked):
        student.zero_grad()
        with computing(hardware("bf16")):
            if asked:
                teacher.logprobs(layout, [])
            student(input_ids=layout.input_ids, attention_mask=layout.attention_mask).logits.sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    assert torch.equal(gradient(asked=True), gradient(asked=False))


def test_in_bf16_the_student_is_at_no_distance_from_itself(layout):
    """Head and hidden states of both are multiplied in the same precision: methods are exact at their fixed point."""
    student = make_model("llama", seed=1)
    teacher = self_teacher(student, "current", precision="bf16")
    scores = teacher.score(layout, [])
    with computing(hardware("bf16")):
        hidden = predicting_states(student, layout).requires_grad_()
        summed = sum_over_tokens(Dense(hidden, read_head(student, STUDENT_VOCAB)), divergence_loss(scores, beta=0.5))
    assert float(summed.values.abs().max()) < 1e-9
    (gradient,) = torch.autograd.grad(summed.loss, hidden)
    assert float(gradient.float().abs().max()) < 1e-6


def test_in_bf16_the_ratio_to_an_old_policy_that_has_not_moved_is_one(layout):
    student = make_model("llama", seed=1)
    with computing(hardware("bf16")):
        dense = Dense(predicting_states(student, layout), read_head(student, STUDENT_VOCAB))
        old = token_logprobs(dense, layout.targets).detach()
        loss = policy_gradient_loss(layout.targets, torch.ones_like(old), old_logprobs=old)
        ratio = sum_over_tokens(dense, loss).metrics["ratio_mean"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-6, atol=0)
