"""Advantages and the policy-gradient loss against closed forms and PPO's definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives import (
    center_advantages,
    discounted_future_sum,
    discounted_returns,
    log_ratio_rewards,
    mean_and_std,
    minillm_advantages,
    pad_rows,
    policy_gradient_loss,
    reverse_kl_advantages,
    sum_over_tokens,
    weighted_sum,
    whiten,
)
from opd.protocols import Dense, Head

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
VOCAB = 7


@st.composite
def batches(draw):
    """Log-probabilities of student and teacher (rows, time), and a mask of right padding."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    time = max(max(lengths), 1)
    student, teacher = -torch.rand(2, len(lengths), time, generator=generator, dtype=torch.float64) * 5
    mask = (torch.arange(time) < torch.tensor(lengths)[:, None]).double()
    return student, teacher, mask


discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def make_loss_inputs(tokens=12, spread=0.5):
    """Logits, targets, advantages of both signs, and old log-probabilities on both sides of the new."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator, dtype=torch.float64)
    new = logits.detach().log_softmax(1)[torch.arange(tokens), targets]
    old = new + spread * torch.randn(tokens, generator=generator, dtype=torch.float64)
    return logits, targets, advantages, old


def summed(logits, targets, advantages, old, clip=None, temperature=1.0):
    loss = policy_gradient_loss(targets, advantages, old_logprobs=old, clip_epsilon=clip, temperature=temperature)
    return sum_over_tokens(Dense(logits, Head(None)), loss)


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(0, 1))
def test_a_discounted_sum_is_a_product_with_powers_of_the_discount(batch, discount):
    values, _, _ = batch
    time = values.shape[1]
    powers = torch.tensor(
        [[discount ** (j - i) if j >= i else 0.0 for j in range(time)] for i in range(time)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(discounted_future_sum(values, discount), values @ powers.T, **TOLERANCE)


def test_a_discounted_sum_leaves_its_input_alone():
    values = torch.ones(1, 4)
    discounted_future_sum(values, 1.0)
    discounted_future_sum(values, 0.0).zero_()
    assert values.tolist() == [[1.0] * 4]


@settings(deadline=None, max_examples=40)
@given(batches(), discounts)
def test_a_student_equal_to_its_teacher_has_no_advantage(batch, discount):
    student, _, mask = batch
    advantages = reverse_kl_advantages(student, student, mask, kl_coef=1.0, kl_discount=discount)
    assert (advantages == 0).all()


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(0.1, 3), st.floats(0.1, 2))
def test_undiscounted_advantages_of_a_constant_gap_count_the_tokens_that_are_left(batch, gap, kl_coef):
    student, _, mask = batch
    advantages = reverse_kl_advantages(student, student - gap, mask, kl_coef=kl_coef, kl_discount=1.0)
    remaining = mask.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(advantages, -kl_coef * gap * remaining, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(batches(), discounts)
def test_advantages_are_zero_at_padding_and_do_not_depend_on_it(batch, discount):
    student, teacher, mask = batch
    plain = reverse_kl_advantages(student, teacher, mask, kl_coef=1.0, kl_discount=discount)
    garbage = torch.where(mask.bool(), teacher, 123.0)
    padded = [torch.nn.functional.pad(tensor, (0, 3)) for tensor in (student, garbage, mask)]
    wider = reverse_kl_advantages(*padded, kl_coef=1.0, kl_discount=discount)
    assert (plain[mask == 0] == 0).all()
    torch.testing.assert_close(wider[:, :-3], plain, **TOLERANCE)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_a_masked_token_inside_a_row_counts_nothing_but_takes_up_time(discount):
    gaps = torch.tensor([[1.0, 7.0, 3.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    advantages = reverse_kl_advantages(gaps, 0 * gaps, mask, kl_coef=1.0, kl_discount=discount)
    torch.testing.assert_close(advantages, torch.tensor([[-1 - 3 * discount**2, 0.0, -3.0]]))


def test_a_long_sum_of_parts_that_cancel_keeps_float32s_digits():
    values = torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))
    exact = values.double().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(discounted_future_sum(values, 1.0).double(), exact, rtol=2e-7, atol=0)


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(-3, 3), st.floats(0, 1))
def test_a_constant_reward_is_its_own_length_normalised_return(batch, reward, discount):
    _, _, mask = batch
    returns = discounted_returns(reward * mask, mask, discount=discount, normalizer_discount=discount)
    torch.testing.assert_close(returns * mask, reward * mask, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(batches(), st.floats(-3, 3))
def test_undiscounted_returns_of_a_constant_reward_count_the_tokens_that_are_left(batch, reward):
    _, _, mask = batch
    returns = discounted_returns(reward * mask, mask, discount=1.0, normalizer_discount=None)
    torch.testing.assert_close(returns * mask, reward * mask.flip(1).cumsum(1).flip(1) * mask, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(batches(), discounts, st.booleans(), st.sampled_from(["trl", "paper", "lmops"]))
def test_minillms_advantages_are_their_definitions_written_out(batch, discount, normalize, mode):
    rewards, _, mask = batch
    actual = minillm_advantages(rewards, mask, discount=discount, length_normalization=normalize, mode=mode)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        for step in range(mask.shape[1]):
            first = step + (mode == "paper")
            powers = [discount**k for k in range(max(length - first, 0))] if step < length else []
            total = sum(power * float(rewards[row, first + k]) for k, power in enumerate(powers))
            weight = {"lmops": len(powers)}.get(mode, sum(powers)) if normalize else 1
            assert float(actual[row, step]) == pytest.approx(total / weight if powers else 0.0, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(batches(), discounts, st.sampled_from(["trl", "paper", "lmops"]))
def test_minillms_advantages_do_not_depend_on_what_is_behind_a_completion(batch, discount, mode):
    rewards, _, mask = batch
    plain = minillm_advantages(rewards * mask, mask, discount=discount, length_normalization=True, mode=mode)
    padded = [torch.nn.functional.pad(tensor, (0, 4)) for tensor in (torch.where(mask.bool(), rewards, 123.0), mask)]
    wider = minillm_advantages(*padded, discount=discount, length_normalization=True, mode=mode)
    torch.testing.assert_close(wider[:, :-4], plain, **TOLERANCE)
    assert (wider[:, -4:] == 0).all()


def test_rewards_are_scaled_first_and_clipped_then():
    teacher = torch.tensor([[-1.0, -9.0, -2.0, -2.0]])
    student = torch.tensor([[-3.0, -1.0, -2.5, -9.0]])
    rewards = log_ratio_rewards(student, teacher, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), scaling=0.5, clip=3.0)
    assert rewards.tolist() == [[3.0, -3.0, 1.0, 0.0]]


@settings(deadline=None, max_examples=40)
@given(batches().filter(lambda batch: float(batch[2].sum()) > 1))
def test_whitened_values_have_mean_zero_and_deviation_one_over_the_loss_tokens(batch):
    values, _, mask = batch
    whitened = whiten(values, mask)
    tokens, wanted = whitened[mask == 1], values[mask == 1]
    assert (whitened[mask == 0] == 0).all()
    expected = (wanted - wanted.mean()) / (wanted.var() + 1e-8).sqrt()
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-9)


def test_whitening_is_over_all_ranks():
    """Two ranks that hold the halves of a batch find what one finds that holds it all."""
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones_like(values)
    mask[0, 3:] = 0
    other = values[2:] * mask[2:]
    others = {3: torch.stack([other.sum(), other.square().sum(), mask[2:].sum()]), 1: mask[2:].sum()}
    first = whiten(values[:2], mask[:2], lambda tensor: tensor + others[tensor.numel()])
    torch.testing.assert_close(first, whiten(values, mask)[:2], **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_centred_advantages_have_mean_zero_over_the_loss_tokens(batch):
    advantages, _, mask = batch
    centred = center_advantages(advantages, mask)
    assert abs(float(centred.sum())) < 1e-10
    assert (centred[mask == 0] == 0).all()
    gaps = (centred - advantages)[mask == 1]
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_mean_and_deviation_are_those_of_the_loss_tokens(batch):
    values, _, mask = batch
    tokens = values[mask == 1]
    mean, std = mean_and_std(values, mask)
    expected = (float(tokens.mean()), float(tokens.std(correction=0))) if len(tokens) else (0.0, 0.0)
    # The deviation is a difference of squares: half of float64's digits remain near zero.
    assert (mean, std) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(batches())
def test_ranks_that_add_up_their_sums_centre_as_one(batch):
    advantages, _, mask = batch
    split = len(advantages) // 2
    parts = [(advantages[:split], mask[:split]), (advantages[split:], mask[split:])]
    sums = []
    for part in parts:
        center_advantages(*part, total=lambda tensor: sums.append(tensor) or tensor)
    ranks = [center_advantages(*part, total=lambda _: sums[0] + sums[1]) for part in parts]
    torch.testing.assert_close(torch.cat(ranks), center_advantages(advantages, mask), **TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.floats(-9, 9), max_size=6), min_size=1, max_size=5))
def test_padded_rows_come_back_by_their_mask(rows):
    padded, mask = pad_rows([torch.tensor(row, dtype=torch.float64) for row in rows])
    assert [kept[flags == 1].tolist() for kept, flags in zip(padded, mask, strict=True)] == rows
    assert (padded[mask == 0] == 0).all()


def test_the_ratio_form_and_the_plain_form_have_one_gradient_where_nothing_has_moved():
    logits, targets, advantages, old = make_loss_inputs(spread=0.0)
    grads = [torch.autograd.grad(summed(logits, targets, advantages, o).loss, logits)[0] for o in (old, None)]
    torch.testing.assert_close(*grads, **TOLERANCE)


def test_the_ratio_form_has_the_gradient_of_the_importance_weighted_objective():
    logits, targets, advantages, old = make_loss_inputs()
    logprobs = logits.log_softmax(1)[torch.arange(len(targets)), targets]
    expected = -(advantages * (logprobs - old).exp()).sum()
    actual = summed(logits, targets, advantages, old)
    torch.testing.assert_close(actual.loss, expected, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, logits), torch.autograd.grad(expected, logits), **TOLERANCE
    )


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
def test_the_clip_is_that_of_ppo(clip):
    """Schulman et al. 2017, eq. 7: min(ρ A, clip(ρ, 1 - ε, 1 + ε) A); a clipped token has no gradient."""
    logits, targets, advantages, old = make_loss_inputs(tokens=60)
    actual = summed(logits, targets, advantages, old, clip)
    ratio = (logits.log_softmax(1)[torch.arange(60), targets] - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    torch.testing.assert_close(actual.values, expected.detach(), **TOLERANCE)
    (grad,) = torch.autograd.grad(actual.loss, logits, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0], **TOLERANCE)
    beyond = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    assert 0 < beyond.sum() < 60
    assert (grad[beyond] == 0).all()
    assert (grad[~beyond] != 0).all()
    assert torch.equal(actual.metrics["clip_fraction"], beyond.double())


def test_the_clip_changes_nothing_within_its_bounds():
    inputs = make_loss_inputs(spread=0.01)
    assert torch.equal(summed(*inputs, clip=0.5).values, summed(*inputs).values)


@pytest.mark.parametrize("old_policy", ["given", "absent"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_gradient_of_a_token_sums_to_zero(old_policy, clip):
    logits, targets, advantages, old = make_loss_inputs()
    loss = summed(logits, targets, advantages, old if old_policy == "given" else None, clip).loss
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(grad)).double(), rtol=0, atol=1e-12)


def test_the_metrics_are_the_ratio_and_the_entropy():
    logits, targets, advantages, old = make_loss_inputs()
    metrics = summed(logits, targets, advantages, old).metrics
    logprobs = logits.detach().log_softmax(1)[torch.arange(len(targets)), targets]
    torch.testing.assert_close(metrics["ratio_mean"], (logprobs - old).exp(), **TOLERANCE)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    torch.testing.assert_close(metrics["entropy"], entropy, **TOLERANCE)


def test_an_impossible_token_leaves_loss_gradient_and_entropy_finite():
    logits, targets, advantages, old = make_loss_inputs()
    impossible = torch.full((len(logits), 1), -math.inf, dtype=torch.float64)
    wide = torch.cat([logits.detach(), impossible], dim=1).requires_grad_()
    actual, expected = (summed(leaf, targets, advantages, old) for leaf in (wide, logits))
    torch.testing.assert_close(actual.values, expected.values, **TOLERANCE)
    torch.testing.assert_close(actual.metrics, expected.metrics, **TOLERANCE)
    (grad,) = torch.autograd.grad(actual.loss, wide)
    torch.testing.assert_close(grad[:, :-1], torch.autograd.grad(expected.loss, logits)[0], **TOLERANCE)
    assert (grad[:, -1] == 0).all()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_temperature_is_a_division_of_the_logits(clip):
    logits, targets, advantages, old = make_loss_inputs()
    hot = summed(logits, targets, advantages, old, clip, temperature=2.0)
    divided = summed(logits / 2, targets, advantages, old, clip)
    torch.testing.assert_close(hot.values, divided.values, **TOLERANCE)
    torch.testing.assert_close(hot.metrics, divided.metrics, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(hot.loss, logits), torch.autograd.grad(divided.loss, logits), **TOLERANCE
    )


def test_a_weighted_sum_has_the_weighted_value_and_gradient_and_tells_its_parts():
    logits, targets, advantages, old = make_loss_inputs()
    parts = [
        policy_gradient_loss(targets, advantages, old_logprobs=old),
        policy_gradient_loss(targets, advantages.flip(0), old_logprobs=None),
    ]
    alone = [sum_over_tokens(Dense(logits, Head(None)), part) for part in parts]
    loss = weighted_sum({"first": (0.3, parts[0]), "second": (2.0, parts[1])})
    together = sum_over_tokens(Dense(logits, Head(None)), loss)
    torch.testing.assert_close(together.values, 0.3 * alone[0].values + 2.0 * alone[1].values, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(together.loss, logits),
        torch.autograd.grad(0.3 * alone[0].loss + 2.0 * alone[1].loss, logits),
        **TOLERANCE,
    )
    assert torch.equal(together.metrics["first"], alone[0].values)
    assert torch.equal(together.metrics["second"], alone[1].values)
    assert "ratio_mean" in together.metrics
