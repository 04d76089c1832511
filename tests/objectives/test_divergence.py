"""Identities of the divergences. Naive formulas and closed forms are the reference; arithmetic is float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd.objectives import (
    divergence_loss,
    generalized_jsd,
    negative_log_likelihood,
    sampled_token_loss,
    sum_over_tokens,
    top_k_scores,
)
from opd.protocols import Dense, Head

BETAS = [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@st.composite
def logit_pairs(draw, max_scale=10.0):
    """Student's and teacher's logits (tokens, vocabulary): any sizes, from nearly flat to nearly one-hot."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 6)), draw(st.integers(2, 17))
    student_scale, teacher_scale = draw(st.floats(0.01, max_scale)), draw(st.floats(0.01, max_scale))
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student * student_scale, teacher * teacher_scale


def naive(student, teacher, beta, temperature=1.0):
    """The definition, in probabilities."""
    s, t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    if beta == 0:
        return (t * (t / s).log()).sum(1)
    if beta == 1:
        return (s * (s / t).log()).sum(1)
    m = beta * t + (1 - beta) * s
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(1)


def value_and_grad(function, student):
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def jsd(student, teacher, beta, temperature=1.0):
    return generalized_jsd(student, teacher, beta=beta, temperature=temperature)[0]


betas = st.sampled_from(BETAS)
inner_betas = st.floats(0.01, 0.99)
temperatures = st.sampled_from([0.5, 0.7, 1.0, 2.0])


@settings(deadline=None, max_examples=60)
@given(logit_pairs(), betas, temperatures)
def test_value_and_gradient_are_those_of_the_definition(pair, beta, temperature):
    student, teacher = pair
    value, grad = value_and_grad(lambda leaf: jsd(leaf, teacher, beta, temperature), student)
    expected, expected_grad = value_and_grad(lambda leaf: naive(leaf, teacher, beta, temperature), student)
    # The naive form divides underflown probabilities: its own error is what the tolerance allows for.
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_gradient_is_that_of_finite_differences(beta, temperature):
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda leaf: jsd(leaf, teacher, beta, temperature), student.requires_grad_(), eps=1e-6, atol=1e-8
    )


@settings(deadline=None, max_examples=40)
@given(logit_pairs())
def test_beta_zero_is_kl_from_teacher_to_student_and_beta_one_is_the_reverse(pair):
    student, teacher = pair
    torch.testing.assert_close(
        jsd(student, teacher, 0.0),
        torch.nn.functional.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True
        ).sum(1),
        **TOLERANCE,
    )
    torch.testing.assert_close(jsd(student, teacher, 1.0), jsd(teacher, student, 0.0), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(max_scale=2.0))
def test_divided_by_a_vanishing_beta_it_tends_to_the_kl_divergence(pair):
    student, teacher = pair
    tiny = 1e-7
    # The next order of the expansion is β χ²-like: within 1e-5 relative to a divergence of order one.
    torch.testing.assert_close(jsd(student, teacher, tiny) / tiny, jsd(student, teacher, 0.0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(jsd(student, teacher, 1 - tiny) / tiny, jsd(student, teacher, 1.0), rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), inner_betas)
def test_swapping_the_models_and_beta_changes_nothing(pair, beta):
    student, teacher = pair
    torch.testing.assert_close(jsd(student, teacher, beta), jsd(teacher, student, 1 - beta), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, temperatures)
def test_equal_models_have_no_divergence_and_no_gradient(pair, beta, temperature):
    student, _ = pair
    value, grad = value_and_grad(lambda leaf: jsd(leaf, student, beta, temperature), student)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(logit_pairs(max_scale=60.0), inner_betas)
@example((torch.tensor([[50.0, -50.0]]).double(), torch.tensor([[-50.0, 50.0]]).double()), 0.5)
def test_it_is_never_negative_and_at_most_the_entropy_of_beta(pair, beta):
    student, teacher = pair
    value = jsd(student, teacher, beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (value >= -1e-14).all()
    assert (value <= entropy + 1e-14).all()
    assert (jsd(student, teacher, 0.5) <= math.log(2) + 1e-14).all()


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, st.floats(-100, 100), st.floats(-100, 100))
def test_a_constant_added_to_a_row_of_logits_changes_nothing(pair, beta, student_shift, teacher_shift):
    student, teacher = pair
    shifted = value_and_grad(lambda leaf: jsd(leaf, teacher + teacher_shift, beta), student + student_shift)
    plain = value_and_grad(lambda leaf: jsd(leaf, teacher, beta), student)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, temperatures)
def test_the_gradient_of_a_token_sums_to_zero(pair, beta, temperature):
    student, teacher = pair
    _, grad = value_and_grad(lambda leaf: jsd(leaf, teacher, beta, temperature), student)
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(grad)).double(), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, st.floats(0.3, 3.0))
def test_a_temperature_is_the_same_as_divided_logits(pair, beta, temperature):
    student, teacher = pair
    value, grad = value_and_grad(lambda leaf: jsd(leaf, teacher, beta, temperature), student)
    divided, divided_grad = value_and_grad(lambda leaf: jsd(leaf, teacher / temperature, beta), student / temperature)
    torch.testing.assert_close(value, divided, **TOLERANCE)
    torch.testing.assert_close(grad, divided_grad / temperature, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_logits_of_fifty_give_finite_values_and_gradients(beta, dtype):
    student = torch.tensor([[50.0, -50.0, 0.0], [-50.0, 50.0, 50.0]], dtype=dtype)
    teacher = torch.tensor([[-50.0, 50.0, 0.0], [50.0, -50.0, -50.0]], dtype=dtype)
    leaf = student.clone().requires_grad_()
    value, metrics = generalized_jsd(leaf, teacher, beta=beta)
    value.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (value, leaf.grad, *metrics.values()))
    if beta in (0.0, 1.0):
        # Closed form, up to terms of e^-50: all mass meets a log-ratio of 100, give or take log 2.
        second = 100.0 + math.log(2) if beta == 0 else 100.0 - math.log(2)
        expected = torch.tensor([100.0, second], dtype=dtype)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, st.data())
def test_a_token_impossible_for_both_adds_nothing(pair, beta, data):
    student, teacher = pair
    column = data.draw(st.integers(0, student.shape[1]))
    impossible = torch.full((len(student), 1), -math.inf, dtype=torch.float64)

    def widen(logits):
        return torch.cat([logits[:, :column], impossible, logits[:, column:]], dim=1)

    value, grad = value_and_grad(lambda leaf: jsd(leaf, widen(teacher), beta), widen(student))
    expected, expected_grad = value_and_grad(lambda leaf: jsd(leaf, teacher, beta), student)
    torch.testing.assert_close(value, expected, **TOLERANCE)
    assert (grad[:, column] == 0).all()
    torch.testing.assert_close(torch.cat([grad[:, :column], grad[:, column + 1 :]], dim=1), expected_grad, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas)
def test_the_metrics_are_both_kl_divergences_and_the_students_entropy(pair, beta):
    student, teacher = pair
    _, metrics = generalized_jsd(student, teacher, beta=beta)
    expected = {
        "forward_kl": jsd(student, teacher, 0.0),
        "reverse_kl": jsd(student, teacher, 1.0),
        "entropy": torch.distributions.Categorical(logits=student).entropy(),
    }
    torch.testing.assert_close(metrics, expected, rtol=1e-10, atol=1e-10)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    jsd(student, teacher, 0.5).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), st.data())
def test_forward_kl_to_a_one_hot_teacher_is_supervised_fine_tuning(pair, data):
    student, _ = pair
    tokens, vocab = student.shape
    targets = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), min_size=tokens, max_size=tokens)))
    one_hot = torch.nn.functional.one_hot(targets, vocab).double().log()
    distilled, tuned = (
        value_and_grad(lambda leaf, loss=loss: sum_over_tokens(Dense(leaf, Head(None)), loss).loss[None], student)
        for loss in (
            divergence_loss(Dense(one_hot, Head(None)), beta=0.0),
            negative_log_likelihood(targets),
        )
    )
    torch.testing.assert_close(distilled, tuned, **TOLERANCE)


def sparse_and_dense(student, teacher, k, beta):
    scores = Dense(teacher, Head(None))
    return (
        sum_over_tokens(Dense(student, Head(None)), divergence_loss(against, beta=beta))
        for against in (top_k_scores(scores, k), scores)
    )


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas)
def test_all_ids_of_a_sparse_teacher_are_the_dense_teacher(pair, beta):
    student, teacher = (logits.clone().requires_grad_() for logits in pair)
    grads = []
    values = []
    for summed in sparse_and_dense(student, teacher, student.shape[1], beta):
        values.append(summed.values)
        grads.append(torch.autograd.grad(summed.loss, student)[0])
    torch.testing.assert_close(*values, **TOLERANCE)
    torch.testing.assert_close(*grads, **TOLERANCE)


@settings(deadline=None, max_examples=60)
@given(logit_pairs(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 20))
def test_a_sparse_divergence_is_a_lower_bound_of_the_dense_one(pair, beta, k):
    sparse, dense = sparse_and_dense(*pair, k, beta)
    assert (sparse.values <= dense.values + 1e-10).all()
    assert (sparse.values >= -1e-14).all()


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 20))
def test_a_sparse_teacher_equal_to_the_student_leaves_nothing_to_learn(pair, beta, k):
    student = pair[0].clone().requires_grad_()
    sparse, _ = sparse_and_dense(student, student.detach(), k, beta)
    (grad,) = torch.autograd.grad(sparse.loss, student)
    torch.testing.assert_close(sparse.values, torch.zeros_like(sparse.values), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(max_scale=4.0), betas, st.integers(1, 16))
def test_a_sparse_divergence_is_that_of_the_buckets(pair, beta, k):
    """Buckets: the teacher's k likeliest ids and everything else, the latter as 1 minus the others."""
    student, teacher = pair
    k = min(k, student.shape[1] - 1)
    ids = teacher.topk(k, dim=1).indices

    def buckets(logits):
        kept = logits.softmax(1).gather(1, ids)
        return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1).log()

    def sparse(leaf):
        scores = top_k_scores(Dense(teacher, Head(None)), k)
        return sum_over_tokens(Dense(leaf, Head(None)), divergence_loss(scores, beta=beta)).loss[None]

    value, grad = value_and_grad(sparse, student)
    expected, expected_grad = value_and_grad(
        lambda leaf: naive(buckets(leaf), buckets(teacher), beta).sum()[None], student
    )
    # 1 minus the others loses digits when the rest is rare (1e-6 of the mass here): that bounds the reference.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-7)


def test_top_k_scores_are_log_probabilities_that_sum_to_one_with_their_tail():
    teacher = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double() * 3
    scores = top_k_scores(Dense(teacher, Head(None)), 5)
    expected = teacher.log_softmax(1).topk(5, dim=1)
    torch.testing.assert_close(scores.ids, expected.indices)
    torch.testing.assert_close(scores.logprobs, expected.values, **TOLERANCE)
    total = torch.cat([scores.logprobs, scores.tail[:, None]], dim=1).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(40).double(), rtol=0, atol=1e-12)


def test_the_tail_of_a_nearly_certain_teacher_keeps_its_digits():
    teacher = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    tail = top_k_scores(Dense(teacher, Head(None)), 1).tail
    # log(3 e^-50 / (1 + 3 e^-50)): 1 minus the first probability would be 0 in float32.
    torch.testing.assert_close(tail, torch.tensor([math.log(3) - 50.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ids_impossible_for_both_leave_a_sparse_loss_finite(beta):
    """A vocabulary padded with -inf: the tail bucket is empty on both sides."""
    student = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.5, -math.inf, -math.inf]])
    sparse, dense = sparse_and_dense(student, teacher, 2, beta)
    torch.testing.assert_close(sparse.values, dense.values)
    grads = [torch.autograd.grad(summed.loss, student)[0] for summed in (sparse, dense)]
    assert torch.isfinite(grads[0]).all()
    torch.testing.assert_close(*grads)


def test_no_tokens_give_empty_sparse_scores():
    scores = top_k_scores(Dense(torch.zeros(0, 7), Head(None)), 3)
    assert (scores.ids.shape, scores.logprobs.shape, scores.tail.shape) == ((0, 3), (0, 3), (0,))


def test_sparse_scores_refuse_a_temperature():
    scores = top_k_scores(Dense(torch.zeros(1, 7), Head(None)), 3)
    with pytest.raises(ValueError, match="temperature 1"):
        divergence_loss(scores, beta=0.5, temperature=2.0)


def naive_terms(student, teacher, beta):
    """What each id adds to the definition, in probabilities."""
    s, t = student.softmax(1), teacher.softmax(1)
    if beta in (0, 1):
        p, q = (t, s) if beta == 0 else (s, t)
        return p * (p / q).log()
    m = beta * t + (1 - beta) * s
    return beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()


def restricted(student, teacher, beta, temperature=1.0, **options):
    return generalized_jsd(student, teacher, beta=beta, temperature=temperature, **options)[0]


clips = st.sampled_from([0.001, 0.05, 0.2, 1.0])


@settings(deadline=None, max_examples=60)
@given(logit_pairs(max_scale=4.0), betas, temperatures, clips)
def test_a_clip_bounds_what_each_id_adds_before_the_sum_and_stops_its_gradient(pair, beta, temperature, clip):
    student, teacher = pair

    def clipped(leaf):
        terms = naive_terms(leaf / temperature, teacher / temperature, beta)
        return torch.where(terms > clip, clip, terms).sum(1)

    actual = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, temperature, token_clip=clip), student)
    torch.testing.assert_close(actual, value_and_grad(clipped, student), rtol=1e-8, atol=1e-10)


def test_a_clipped_id_pulls_no_more_but_its_negative_counterparts_still_count():
    # T = (3/4, 1/4), S = (1/4, 3/4): the first id adds 3/4 log 3 to KL(T, S), the second -1/4 log 3.
    student = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    value, grad = value_and_grad(lambda leaf: restricted(leaf, teacher, 0.0, token_clip=0.1), student)
    torch.testing.assert_close(value, torch.tensor([0.1 - math.log(3) / 4], dtype=torch.float64), **TOLERANCE)
    # What is left is -1/4 log S_2, with gradient -1/4 (1[v = 2] - S).
    torch.testing.assert_close(grad, torch.tensor([[1 / 16, -1 / 16]]).double(), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, temperatures)
def test_an_infinite_clip_is_no_clip(pair, beta, temperature):
    student, teacher = pair
    unbounded = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, temperature, token_clip=math.inf), student)
    plain = value_and_grad(lambda leaf: jsd(leaf, teacher, beta, temperature), student)
    torch.testing.assert_close(unbounded, plain, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, temperatures, st.integers(0, 3))
def test_the_whole_vocabulary_as_top_k_is_no_top_k(pair, beta, temperature, more):
    student, teacher = pair
    k = student.shape[1] + more
    kept = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, temperature, top_k=k), student)
    plain = value_and_grad(lambda leaf: jsd(leaf, teacher, beta, temperature), student)
    torch.testing.assert_close(kept, plain, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(max_scale=4.0), betas, temperatures, st.integers(1, 17), st.none() | clips)
def test_top_k_compares_both_models_renormalised_to_the_teachers_likeliest_ids(pair, beta, temperature, k, clip):
    student, teacher = pair
    ids = teacher.topk(min(k, teacher.shape[1]), dim=1).indices

    def expected(leaf):
        # Renormalised probabilities: divided by their sum over the kept ids.
        kept = [(logits / temperature).softmax(1).gather(1, ids) for logits in (leaf, teacher)]
        terms = naive_terms(*[(p / p.sum(1, keepdim=True)).log() for p in kept], beta)
        return terms.clamp(max=clip if clip is not None else math.inf).sum(1)

    actual = value_and_grad(
        lambda leaf: restricted(leaf, teacher, beta, temperature, top_k=k, token_clip=clip), student
    )
    torch.testing.assert_close(actual, value_and_grad(expected, student), rtol=1e-8, atol=1e-10)


options = st.fixed_dictionaries({"token_clip": st.none() | clips, "top_k": st.none() | st.integers(1, 17)})


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, options, st.floats(-100, 100), st.floats(0.3, 3.0))
def test_clip_and_top_k_keep_the_identities_of_a_softmax_loss(pair, beta, options, shift, temperature):
    """Its gradient sums to zero, a shift of a row changes nothing, and τ is the same as divided logits."""
    student, teacher = pair
    plain = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, temperature, **options), student)
    shifted = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, temperature, **options), student + shift)
    torch.testing.assert_close(plain[1].sum(1), torch.zeros(len(student)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-11)
    value, grad = value_and_grad(
        lambda leaf: restricted(leaf, teacher / temperature, beta, **options), student / temperature
    )
    torch.testing.assert_close((value, grad / temperature), plain, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(), betas, options, temperatures)
def test_clip_and_top_k_leave_equal_models_alone(pair, beta, options, temperature):
    student, _ = pair
    value, grad = value_and_grad(lambda leaf: restricted(leaf, student, beta, temperature, **options), student)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(max_scale=3.0), betas, options, temperatures)
def test_clip_and_top_k_leave_the_metrics_to_the_whole_vocabulary(pair, beta, options, temperature):
    student, teacher = pair
    _, plain = generalized_jsd(student, teacher, beta=beta, temperature=temperature)
    _, metrics = generalized_jsd(student, teacher, beta=beta, temperature=temperature, **options)
    clipped = metrics.pop("clip_fraction", None)
    torch.testing.assert_close(metrics, plain, **TOLERANCE)
    assert (clipped is None) == (options["token_clip"] is None)


def test_clip_fraction_counts_the_tokens_at_which_an_id_was_bounded():
    teacher = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4]], dtype=torch.float64).log()
    student = torch.full((3, 2), 0.5, dtype=torch.float64).log()
    # The largest terms of KL(T, S) are 0.9 log 1.8 = 0.53, 0 and 0.6 log 1.2 = 0.11.
    _, metrics = generalized_jsd(student, teacher, beta=0.0, token_clip=0.2)
    assert metrics["clip_fraction"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{"token_clip": 0.05}, {"top_k": 2}, {"token_clip": 0.05, "top_k": 2}], ids=str)
def test_clipped_and_restricted_losses_of_extreme_and_impossible_ids_are_finite(beta, dtype, options):
    impossible = -math.inf
    student = torch.tensor([[50.0, -50.0, 0.0, impossible], [-50.0, 50.0, 50.0, impossible]], dtype=dtype)
    teacher = torch.tensor([[-50.0, 50.0, 0.0, impossible], [50.0, -50.0, -50.0, impossible]], dtype=dtype)
    value, grad = value_and_grad(lambda leaf: restricted(leaf, teacher, beta, **options), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()
    assert (grad[:, 3] == 0).all()


def test_agreement_says_where_both_find_the_same_id_likeliest():
    student = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    teacher = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [1.0, 1.0, 1.5]])
    loss = divergence_loss(Dense(teacher, Head(None)), beta=0.5, agreement=True)
    metrics = sum_over_tokens(Dense(student, Head(None)), loss).metrics
    assert metrics["teacher_student_agreement"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("options", [{"token_clip": 0.1}, {"top_k": 2}, {"agreement": True}], ids=str)
def test_sparse_scores_refuse_what_reads_the_whole_distribution(options):
    scores = top_k_scores(Dense(torch.zeros(1, 7), Head(None)), 3)
    with pytest.raises(ValueError, match="sparse"):
        divergence_loss(scores, beta=0.5, **options)


@settings(deadline=None, max_examples=40)
@given(logit_pairs(max_scale=3.0), temperatures)
def test_the_sampled_token_loss_descends_the_reverse_kl_in_expectation(pair, temperature):
    """The expectation over the student's own tokens is formed exactly, id by id."""
    student, teacher = pair
    probabilities = (student / temperature).softmax(1)

    def expected(leaf):
        total = leaf.new_zeros(len(leaf))
        for token in range(leaf.shape[1]):
            targets = torch.full((len(leaf),), token)
            loss = sampled_token_loss(Dense(teacher, Head(None)), targets, temperature=temperature)
            value, _ = loss(leaf, slice(None))
            total = total + probabilities[:, token] * value
        return total

    _, grad = value_and_grad(expected, student)
    _, reverse = value_and_grad(lambda leaf: jsd(leaf, teacher, 1.0, temperature), student)
    torch.testing.assert_close(grad, reverse, **TOLERANCE)


def test_the_sampled_token_loss_has_the_value_and_metrics_it_states():
    student = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    loss = sampled_token_loss(Dense(teacher, Head(None)), torch.tensor([0]))
    value, metrics = loss(student, slice(None))
    # A = log(3/4) - log(1/4) = log 3, so that -A log S = log 3 · log 4.
    assert value.item() == pytest.approx(math.log(3) * math.log(4), rel=1e-12)
    divergence = math.log(3) / 2  # both ways: (3/4 - 1/4) log 3
    assert metrics["forward_kl"].item() == pytest.approx(divergence, rel=1e-12)
    assert metrics["reverse_kl"].item() == pytest.approx(divergence, rel=1e-12)
    assert metrics["teacher_student_agreement"].item() == 0.0
