"""Identities of DPO's pair loss and of ADPA's expected advantage. Closed forms are the reference; arithmetic is float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives import (
    complete_pairs,
    divergence_loss,
    expected_advantage_loss,
    forward_kl_loss,
    pair_logprobs,
    pair_loss,
    reward_metrics,
    sum_over_tokens,
    top_k_scores,
)
from opd.protocols import Dense, Head, Sparse, TokenSequence

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
betas = st.floats(0.01, 2.0)
smoothings = st.sampled_from([0.0, 0.1, 0.3, 0.5])
seeds = st.integers(0, 2**31)


def make_logps(seed, pairs=5):
    """log π(y|x) of a student and a reference, (pairs, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return -50 * torch.rand(2, pairs, 2, generator=generator, dtype=torch.float64)


def pair_gradient(student, reference, **settings):
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pair_loss(leaf, reference, **settings).sum(), leaf)
    return grad


def margins(student, reference, beta):
    return beta * ((student - reference)[:, 0] - (student - reference)[:, 1])


@settings(deadline=None, max_examples=40)
@given(seeds, betas, smoothings)
def test_a_student_equal_to_its_reference_loses_log_two_and_earns_nothing(seed, beta, smoothing):
    student, _ = make_logps(seed)
    losses = pair_loss(student, student, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), **TOLERANCE)
    metrics = reward_metrics(student, student, beta)
    for name in ("accuracy", "reward_margin", "chosen_rewards", "rejected_rewards"):
        assert float(metrics[name][0]) == 0.0


@settings(deadline=None, max_examples=40)
@given(seeds, betas, smoothings)
def test_the_gradient_is_minus_beta_sigma_of_minus_h_for_the_chosen_and_its_opposite_for_the_other(
    seed, beta, smoothing
):
    student, reference = make_logps(seed)
    h = margins(student, reference, beta)
    of_chosen = -beta * ((1 - smoothing) * torch.sigmoid(-h) - smoothing * torch.sigmoid(h))
    grad = pair_gradient(student, reference, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(grad, torch.stack([of_chosen, -of_chosen], dim=1), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(seeds, betas)
def test_swapping_the_answers_turns_h_round(seed, beta):
    student, reference = make_logps(seed)
    h = margins(student, reference, beta)
    plain = pair_loss(student, reference, beta=beta)
    swapped = pair_loss(student.flip(1), reference.flip(1), beta=beta)
    torch.testing.assert_close(swapped - plain, h, rtol=1e-9, atol=1e-11)  # log σ(h) - log σ(-h) = h
    before, after = reward_metrics(student, reference, beta), reward_metrics(student.flip(1), reference.flip(1), beta)
    assert float(after["reward_margin"][0]) == pytest.approx(-float(before["reward_margin"][0]))
    assert float(before["accuracy"][0] + after["accuracy"][0]) == len(h)


@settings(deadline=None, max_examples=20)
@given(seeds, betas)
def test_half_smoothed_labels_have_no_gradient_where_the_answers_are_equal(seed, beta):
    student, _ = make_logps(seed)
    grad = pair_gradient(student, student, beta=beta, label_smoothing=0.5)
    torch.testing.assert_close(grad, torch.zeros_like(grad), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(seeds, betas, smoothings, st.floats(-100, 100))
def test_a_constant_added_to_both_reference_log_probabilities_changes_nothing(seed, beta, smoothing, constant):
    student, reference = make_logps(seed)
    plain = pair_loss(student, reference, beta=beta, label_smoothing=smoothing)
    shifted = pair_loss(student, reference + constant, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_for_a_vanishing_beta_the_gradient_over_beta_is_one_half(seed):
    student, reference = make_logps(seed)
    beta = 1e-8
    expected = torch.tensor([[-0.5, 0.5]], dtype=torch.float64).expand_as(student)
    torch.testing.assert_close(pair_gradient(student, reference, beta=beta) / beta, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("margin", [-1e5, 1e5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_margin_of_any_size_has_a_finite_loss_and_gradient(margin, smoothing):
    student, reference = torch.tensor([[margin, 0.0]]), torch.zeros(1, 2)
    assert pair_loss(student, reference, beta=1.0, label_smoothing=smoothing).isfinite().all()
    assert pair_gradient(student, reference, beta=1.0, label_smoothing=smoothing).isfinite().all()


def answer(row, kind, mask):
    return TokenSequence(row, [1, 2], [3] * len(mask), mask, kind=kind)


def test_the_log_probability_of_an_answer_is_the_sum_over_its_own_loss_tokens_or_their_mean():
    sequences = [
        answer(0, "chosen", [True, False, True]),
        answer(0, "rejected", [True]),
        answer(1, "chosen", [True, True]),
        answer(1, "response", [False, True, True, True]),
    ]
    logprobs = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    assert pair_logprobs(logprobs, sequences).tolist() == [[3.0, 4.0], [24.0, 224.0]]
    assert pair_logprobs(logprobs, sequences, average=True).tolist() == [[1.5, 4.0], [12.0, pytest.approx(224 / 3)]]


def test_a_pair_with_an_answer_without_tokens_is_left_out():
    sequences = [
        answer(0, "chosen", [True]),
        answer(0, "rejected", [False]),
        answer(1, "chosen", [True]),
        answer(1, "rejected", [True]),
    ]
    assert complete_pairs(sequences) == [False, True]
    assert pair_logprobs(torch.tensor([1.0, 2.0, 4.0]), sequences).tolist() == [[2.0, 4.0]]
    assert pair_logprobs(torch.tensor([1.0]), sequences[:2]).shape == (0, 2)


@pytest.mark.parametrize(
    "sequences",
    [
        [answer(0, "rejected", [True]), answer(0, "chosen", [True])],
        [answer(0, "chosen", [True]), answer(1, "rejected", [True])],
        [answer(0, "chosen", [True]), answer(0, "chosen", [True])],
    ],
    ids=["the other answer first", "another row", "twice chosen"],
)
def test_what_is_no_pair_is_refused(sequences):
    with pytest.raises(AssertionError, match="a pair is"):
        complete_pairs(sequences)


@st.composite
def three_models(draw, max_scale=10.0):
    """Logits (tokens, vocabulary) of a student, a DPO teacher and a reference teacher, and targets."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = draw(st.integers(1, 6)), draw(st.integers(2, 17))
    scales = torch.tensor([draw(st.floats(0.01, max_scale)) for _ in range(3)], dtype=torch.float64)
    logits = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * scales[:, None, None]
    return (*logits, torch.randint(shape[1], (shape[0],), generator=generator))


def dense(logits):
    return Dense(logits, Head(None))


def tokens_of(loss, student):
    """Values, gradient and metrics of a token loss."""
    leaf = student.clone().requires_grad_()
    summed = sum_over_tokens(dense(leaf), loss)
    (grad,) = torch.autograd.grad(summed.loss, leaf)
    return summed.values, grad, summed.metrics


@settings(deadline=None, max_examples=40)
@given(three_models())
def test_value_and_gradient_are_those_of_the_expected_advantage(models):
    student, dpo, ref, targets = models
    values, grad, metrics = tokens_of(expected_advantage_loss(targets, dense(dpo), dense(ref)), student)
    policy, advantages = student.softmax(1), dpo.log_softmax(1) - ref.log_softmax(1)
    expected = (policy * advantages).sum(1)
    torch.testing.assert_close(values, -expected, **TOLERANCE)
    torch.testing.assert_close(grad, -policy * (advantages - expected[:, None]), **TOLERANCE)
    torch.testing.assert_close(metrics["expected_advantage"], expected, **TOLERANCE)
    torch.testing.assert_close(
        metrics["advantage_on_response"], advantages[torch.arange(len(targets)), targets], **TOLERANCE
    )


@settings(deadline=None, max_examples=40)
@given(three_models(), st.integers(1, 17))
def test_outside_the_dpo_teachers_likeliest_ids_there_is_no_advantage(models, k):
    student, dpo, ref, targets = models
    values, grad, metrics = tokens_of(expected_advantage_loss(targets, dense(dpo), dense(ref), top_k=k), student)
    policy, advantages = student.softmax(1), dpo.log_softmax(1) - ref.log_softmax(1)
    rank = dpo.argsort(1, descending=True).argsort(1)
    advantages = advantages * (rank < k)
    expected = (policy * advantages).sum(1)
    torch.testing.assert_close(values, -expected, **TOLERANCE)
    torch.testing.assert_close(grad, -policy * (advantages - expected[:, None]), **TOLERANCE)
    torch.testing.assert_close(
        metrics["advantage_on_response"], advantages[torch.arange(len(targets)), targets], **TOLERANCE
    )


@settings(deadline=None, max_examples=20)
@given(three_models())
def test_all_ids_kept_are_the_whole_vocabulary(models):
    student, dpo, ref, targets = models
    whole = tokens_of(expected_advantage_loss(targets, dense(dpo), dense(ref)), student)
    kept = tokens_of(expected_advantage_loss(targets, dense(dpo), dense(ref), top_k=student.shape[1]), student)
    torch.testing.assert_close(kept, whole, **TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(three_models())
def test_equal_teachers_have_no_advantage_and_no_gradient(models):
    student, dpo, _, targets = models
    values, grad, _ = tokens_of(expected_advantage_loss(targets, dense(dpo), dense(dpo)), student)
    assert float(values.abs().max()) == 0.0
    assert float(grad.abs().max()) == 0.0


@settings(deadline=None, max_examples=20)
@given(three_models(), st.floats(-5, 5))
def test_an_advantage_that_is_the_same_for_every_id_has_no_gradient(models, constant):
    student, dpo, _, targets = models
    scores = top_k_scores(dense(dpo), student.shape[1])
    lower = Sparse(scores.ids, scores.logprobs - constant, scores.tail)
    values, grad, _ = tokens_of(expected_advantage_loss(targets, scores, lower), student)
    torch.testing.assert_close(values, torch.full_like(values, -constant), **TOLERANCE)
    torch.testing.assert_close(grad, torch.zeros_like(grad), **TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(three_models(), st.integers(1, 17))
def test_stored_scores_are_as_good_as_the_teachers(models, k):
    student, dpo, ref, targets = models
    stored = top_k_scores(dense(dpo), k)
    of_ref = Sparse(stored.ids, ref.log_softmax(1).gather(1, stored.ids), stored.tail)
    torch.testing.assert_close(
        tokens_of(expected_advantage_loss(targets, stored, of_ref), student),
        tokens_of(expected_advantage_loss(targets, dense(dpo), dense(ref), top_k=k), student),
        **TOLERANCE,
    )


def test_scores_that_do_not_fit_together_are_refused():
    dpo, ref = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    targets, of_dpo, of_ref = torch.tensor([0]), top_k_scores(dense(dpo), 2), top_k_scores(dense(ref), 2)
    with pytest.raises(ValueError, match="same ids"):
        expected_advantage_loss(targets, of_dpo, of_ref)
    with pytest.raises(ValueError, match="both"):
        expected_advantage_loss(targets, of_dpo, dense(ref))
    with pytest.raises(ValueError, match="top_k is needed"):
        expected_advantage_loss(targets, dense(dpo), dense(ref), released_quirks=True)
    with pytest.raises(ValueError, match="top_k is needed"):
        forward_kl_loss(dense(dpo), released_quirks=True)


def test_advantages_are_clipped_to_their_bounds():
    student, dpo, ref = torch.zeros(3, 1, 2, dtype=torch.float64)
    dpo[0, 0], ref[0, 0] = 4.0, -4.0  # A of the first id is log σ(4) - log σ(-4) = 4, of the second -4
    values, _, _ = tokens_of(
        expected_advantage_loss(torch.tensor([0]), dense(dpo), dense(ref), clip=(-1.0, 3.0)), student
    )
    torch.testing.assert_close(values, torch.tensor([-(3.0 - 1.0) / 2], dtype=torch.float64), **TOLERANCE)


def test_an_id_that_neither_teacher_allows_adds_nothing():
    student, dpo, ref = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dpo[:, 2] = ref[:, 2] = -math.inf
    values, grad, _ = tokens_of(expected_advantage_loss(torch.tensor([0, 1]), dense(dpo), dense(ref)), student)
    advantages = (dpo.log_softmax(1) - ref.log_softmax(1)).nan_to_num(0.0)
    torch.testing.assert_close(values, -(student.softmax(1) * advantages).sum(1), **TOLERANCE)
    assert grad.isfinite().all()


def test_the_released_advantages_forget_what_the_teacher_learnt_to_avoid_and_fill_in_what_the_reference_lacks():
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    dpo = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    ref = torch.tensor([[0.6, 0.05, 0.3, 0.05]], dtype=torch.float64)
    loss = expected_advantage_loss(torch.tensor([1]), dense(dpo.log()), dense(ref.log()), top_k=2, released_quirks=True)
    values, _, _ = tokens_of(loss, student.log())
    # Ids 0 and 1 are kept. log(.5/.6) < 0 counts as 1e-8; id 1 is not among the reference's two (0 and 2), so it is
    # taken for as likely there as the DPO teacher's second, .3: log(.3/.3) = 0, instead of log(.3/.05).
    torch.testing.assert_close(values, -(0.4 + 0.3) * torch.tensor([1e-8], dtype=torch.float64), **TOLERANCE)
    signed, _, _ = tokens_of(
        expected_advantage_loss(torch.tensor([1]), dense(dpo.log()), dense(ref.log()), top_k=2), student.log()
    )
    expected = 0.4 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.05)
    torch.testing.assert_close(signed, torch.tensor([-expected], dtype=torch.float64), **TOLERANCE)


@settings(deadline=None, max_examples=30)
@given(three_models(), st.integers(1, 17))
def test_the_forward_kl_of_k_ids_and_the_rest_is_at_most_that_of_the_vocabulary(models, k):
    student, teacher, _, _ = models
    values, _, _ = tokens_of(forward_kl_loss(dense(teacher), top_k=k), student)
    whole, _, _ = tokens_of(forward_kl_loss(dense(teacher)), student)
    reference = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    torch.testing.assert_close(whole, reference, rtol=1e-9, atol=1e-11)
    assert (values <= whole + 1e-12).all()
    assert (values >= -1e-12).all()


@settings(deadline=None, max_examples=20)
@given(three_models(), st.integers(1, 17))
def test_a_student_equal_to_its_teacher_has_no_forward_kl(models, k):
    student, _, _, _ = models
    values, grad, _ = tokens_of(forward_kl_loss(dense(student), top_k=k), student)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(three_models(max_scale=2.0), st.integers(1, 16))
def test_the_released_floors_do_nothing_to_probabilities_above_them(models, k):
    student, teacher, _, _ = models
    k = min(k, student.shape[1] - 1)
    released = tokens_of(forward_kl_loss(dense(teacher), top_k=k, released_quirks=True), student)
    plain = tokens_of(divergence_loss(top_k_scores(dense(teacher), k), beta=0.0), student)
    torch.testing.assert_close(released[:2], plain[:2], rtol=1e-7, atol=1e-9)


def test_a_probability_below_the_released_floor_is_taken_for_it_and_has_no_gradient():
    student = torch.tensor([[0.0, -40.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    values, grad, _ = tokens_of(forward_kl_loss(dense(teacher.log()), top_k=1, released_quirks=True), student)
    expected = 0.5 * (math.log(0.5) - math.log(1e-7)) + 0.5 * math.log(0.5)  # the rest has all of the student's mass
    torch.testing.assert_close(values, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)
