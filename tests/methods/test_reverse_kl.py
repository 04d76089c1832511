"""Policy gradients are right in expectation: every sequence of a small tabular language is enumerated.

The student is a table of logits: a row for each prefix of up to two tokens, of four. The expectation, over its 64
sequences, of what ReverseKL accumulates is compared with autograd of the divergences that it is to descend.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from opd.data.collate import lay_out
from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, Layout, TokenSequence

VOCAB, STEPS = 4, 3
TOLERANCE = {"rtol": 0, "atol": 1e-12}
PREFIXES = [prefix for length in range(STEPS) for prefix in itertools.product(range(VOCAB), repeat=length)]
SEQUENCES = list(itertools.product(range(VOCAB), repeat=STEPS))
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
# (sequences, steps): the table's row that predicts each token, and the token.
ROWS = torch.tensor([[ROW[sequence[:step]] for step in range(STEPS)] for sequence in SEQUENCES])
TOKENS = torch.tensor(SEQUENCES)


@pytest.fixture
def tables():
    """Logits of the student (trained), of an old student and of the teacher, by prefix."""
    generator = torch.Generator().manual_seed(7)
    student, old, teacher = torch.randn(3, len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), old, teacher


def make_method(**settings):
    defaults = {
        "kl_coef": 1.0,
        "kl_discount": 0.0,
        "num_substeps": 1,
        "importance_ratio": True,
        "clip_epsilon": None,
        "center_advantages": False,
    }
    return METHODS["reverse_kl"](METHODS["reverse_kl"].Config(name="reverse_kl", **{**defaults, **settings}))


def token_logprobs(table):
    """(sequences, steps)"""
    return table.log_softmax(1)[ROWS, TOKENS]


def prefix_probabilities(table):
    """Probability of reaching each prefix."""
    return torch.stack(
        [
            torch.stack([table.softmax(1)[ROW[prefix[:step]], prefix[step]] for step in range(len(prefix))]).prod()
            if prefix
            else torch.ones((), dtype=table.dtype)
            for prefix in PREFIXES
        ]
    )


def make_sequence(number, old, teacher):
    sequence = TokenSequence(
        row=number,
        prompt_ids=[0],
        completion_ids=list(SEQUENCES[number]),
        completion_mask=[True] * STEPS,
        origin="student",
    )
    sequence.token_scores = {"student_logprobs": old[number], "teacher_logprobs": teacher[number]}
    return sequence


def make_batch(sequences):
    layout = lay_out([sequence.student_view for sequence in sequences], pad_id=0)
    names = sequences[0].token_scores
    scores = {name: torch.cat([sequence.token_scores[name] for sequence in sequences]) for name in names}
    return Batch(sequences, layout, token_scores=scores)


def expected_gradient(method, student, old, teacher):
    """The expectation, over sequences of the old policy, of the gradient of the method's summed loss."""
    old_logprobs, teacher_logprobs = token_logprobs(old.detach()), token_logprobs(teacher)
    probabilities = old_logprobs.sum(1).exp()
    sequences = [make_sequence(number, old_logprobs, teacher_logprobs) for number in range(len(SEQUENCES))]
    method.window(sequences, lambda tensor: tensor)
    loss = torch.zeros((), dtype=torch.float64)
    for number, sequence in enumerate(sequences):
        terms = method.loss(Dense(student[ROWS[number]], Head(None)), {}, make_batch([sequence])).terms
        loss = loss + probabilities[number] * sum(term.weight * term.sum for term in terms)
    (grad,) = torch.autograd.grad(loss, student)
    return grad


@pytest.mark.parametrize("importance_ratio", [True, False])
def test_without_discount_it_is_the_gradient_of_the_token_kl_at_visited_prefixes(tables, importance_ratio):
    student, _, teacher = tables
    method = make_method(kl_discount=0.0, importance_ratio=importance_ratio)
    logprobs = student.log_softmax(1)
    token_kl = (logprobs.exp() * (logprobs - teacher.log_softmax(1))).sum(1)
    (expected,) = torch.autograd.grad((prefix_probabilities(student).detach() * token_kl).sum(), student)
    torch.testing.assert_close(expected_gradient(method, student, student, teacher), expected, **TOLERANCE)


@pytest.mark.parametrize("importance_ratio", [True, False])
def test_with_discount_one_it_is_the_gradient_of_the_kl_of_sequences(tables, importance_ratio):
    student, _, teacher = tables
    method = make_method(kl_discount=1.0, importance_ratio=importance_ratio)
    logprobs = token_logprobs(student).sum(1)
    sequence_kl = (logprobs.exp() * (logprobs - token_logprobs(teacher).sum(1))).sum()
    (expected,) = torch.autograd.grad(sequence_kl, student)
    torch.testing.assert_close(expected_gradient(method, student, student, teacher), expected, **TOLERANCE)


def test_after_a_substep_the_ratio_corrects_the_choice_of_tokens(tables):
    """Σ_prefix π_old(prefix) Σ_a π_θ(a) Δ_old(a): the old policy's prefixes and gaps, the new one's tokens."""
    student, old, teacher = tables
    gaps = old.log_softmax(1) - teacher.log_softmax(1)
    surrogate = (prefix_probabilities(old) * (student.softmax(1) * gaps).sum(1)).sum()
    (expected,) = torch.autograd.grad(surrogate, student)
    torch.testing.assert_close(expected_gradient(make_method(), student, old, teacher), expected, **TOLERANCE)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_the_coefficient_scales_the_gradient(tables, discount):
    student, _, teacher = tables
    once, thrice = (
        expected_gradient(make_method(kl_coef=coef, kl_discount=discount), student, student, teacher)
        for coef in (1.0, 3.0)
    )
    torch.testing.assert_close(thrice, 3 * once, **TOLERANCE)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_centring_by_a_constant_leaves_the_expected_gradient(tables, discount):
    """The mean over all sequences does not depend on which one is drawn: a baseline."""
    student, _, teacher = tables
    plain, centred = (
        expected_gradient(make_method(kl_discount=discount, center_advantages=flag), student, student, teacher)
        for flag in (False, True)
    )
    torch.testing.assert_close(centred, plain, **TOLERANCE)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("center", [False, True])
def test_a_student_equal_to_its_teacher_stays(tables, discount, center):
    student, _, _ = tables
    method = make_method(kl_discount=discount, center_advantages=center)
    grad = expected_gradient(method, student, student, student.detach())
    assert (grad == 0).all()


def test_a_step_along_the_gradient_lowers_the_kl_of_sequences(tables):
    student, _, teacher = tables
    grad = expected_gradient(make_method(kl_discount=1.0), student, student, teacher)

    def sequence_kl(table):
        logprobs = token_logprobs(table).sum(1)
        return float((logprobs.exp() * (logprobs - token_logprobs(teacher).sum(1))).sum())

    with torch.no_grad():
        assert sequence_kl(student - 0.1 * grad) < sequence_kl(student)


def test_the_windows_metrics_are_means_over_the_loss_tokens(tables):
    student, _, teacher = tables
    old_logprobs, teacher_logprobs = token_logprobs(student.detach()), token_logprobs(teacher)
    sequences = [make_sequence(number, old_logprobs, teacher_logprobs) for number in range(9)]
    gaps = (old_logprobs - teacher_logprobs)[:9]
    metrics = make_method(kl_coef=2.0).window(sequences, lambda tensor: tensor)
    assert metrics == pytest.approx(
        {
            "reverse_kl": float(gaps.mean()),
            "advantage_mean": float(-2 * gaps.mean()),
            "advantage_std": float(2 * gaps.std(correction=0)),
        },
        rel=1e-9,
    )


def test_what_the_sampler_and_the_trainer_make_of_a_token_is_compared_where_both_are_known(tables):
    """E over the sampler's tokens of log sampler - log student: their KL, which a sampler at temperature 1 has not."""
    student, old, teacher = tables
    own, sampler = token_logprobs(student.detach()), token_logprobs(old)
    sequences = [make_sequence(number, own, token_logprobs(teacher)) for number in range(9)]
    for number, sequence in enumerate(sequences):
        sequence.token_scores["sampler_logprobs"] = sampler[number]
    metrics = make_method().window(sequences, lambda tensor: tensor)
    assert metrics["sampler_trainer_kl"] == pytest.approx(float((sampler - own)[:9].mean()), rel=1e-9)


def test_a_shorter_sequence_keeps_its_own_number_of_advantages(tables):
    """Rows of a window are padded to the longest; what comes back is one number a loss token."""
    student, _, teacher = tables
    old_logprobs, teacher_logprobs = token_logprobs(student.detach()), token_logprobs(teacher)
    short, full = (make_sequence(number, old_logprobs, teacher_logprobs) for number in (0, 1))
    for name in short.token_scores:
        short.token_scores[name] = short.token_scores[name][:1]
    make_method(kl_discount=1.0).window([short, full], lambda tensor: tensor)
    gap = old_logprobs - teacher_logprobs
    torch.testing.assert_close(short.token_scores["advantages"], -gap[0, :1])
    torch.testing.assert_close(full.token_scores["advantages"], -gap[1].flip(0).cumsum(0).flip(0))


@pytest.mark.parametrize("importance_ratio", [True, False])
def test_a_micro_batch_without_loss_tokens_has_a_zero_loss_and_the_same_metrics(tables, importance_ratio):
    student, _, teacher = tables
    method = make_method(importance_ratio=importance_ratio, clip_epsilon=0.2 if importance_ratio else None)
    sequence = make_sequence(0, token_logprobs(student.detach()), token_logprobs(teacher))
    method.window([sequence], lambda tensor: tensor)
    batch = make_batch([sequence])
    some = method.loss(Dense(student[ROWS[0]], Head(None)), {}, batch)
    batch.layout = Layout(*(None if tensor is None else tensor[:0] for tensor in vars(batch.layout).values()))
    batch.token_scores = {name: column[:0] for name, column in batch.token_scores.items()}
    none = method.loss(Dense(student[:0], Head(None)), {}, batch)
    (grad,) = torch.autograd.grad(none.terms[0].sum, student)
    assert float(none.terms[0].sum.detach()) == 0.0
    assert (grad == 0).all()
    assert list(none.metrics) == list(some.metrics)
    assert list(none.maxima) == list(some.maxima)
