"""The tiled sum equals what autograd makes of the full logits, and never holds them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.objectives import (
    divergence_loss,
    fused,
    negative_log_likelihood,
    policy_gradient_loss,
    sum_over_tokens,
    token_logprobs,
    token_values,
)
from opd.protocols import Dense, Head

TOKENS, HIDDEN, VOCAB = 50, 6, 23
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# Bytes of a tile: 16 tokens at a time (the least), 20, and all of them at once.
TILE_BYTES = [1, 20 * 4 * VOCAB, 2**25]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "cut vocabulary": {"vocab_size": 19},
    "all at once": {"bias": True, "softcap": 3.0, "scale": 0.25, "vocab_size": 19},
}


def make_student(dtype=torch.float64, *, bias=False, weight=True, **settings):
    """A student with random hidden states and head that all want gradients, and those leaves."""
    generator = torch.Generator().manual_seed(11)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = leaf(TOKENS, HIDDEN if weight else VOCAB)
    head = Head(leaf(VOCAB, HIDDEN) if weight else None, leaf(VOCAB) if bias else None, **settings)
    return Dense(hidden, head), [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]


def make_teacher(dtype=torch.float64, vocab=VOCAB):
    generator = torch.Generator().manual_seed(12)
    hidden, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((TOKENS, 9), (vocab, 9))
    )
    return Dense(hidden, Head(weight, vocab_size=19))


def full_logits(student):
    """The definition in protocols.Head, in one piece."""
    hidden, head = student.hidden, student.head
    logits = hidden if head.weight is None else hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, : head.vocab_size]


def make_losses(vocab):
    """Each loss of tokens, and its definition as a function of all logits."""
    generator = torch.Generator().manual_seed(13)
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    advantages, old = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    picked = torch.arange(TOKENS), targets
    teacher = make_teacher()
    teacher = dataclasses.replace(teacher, head=dataclasses.replace(teacher.head, vocab_size=vocab))
    teacher_probs = full_logits(teacher).softmax(1)

    def forward_kl(logits):
        return (teacher_probs * (teacher_probs.log() - logits.log_softmax(1))).sum(1)

    def surrogate(logits):
        return -advantages * (logits.log_softmax(1)[picked] - old).exp()

    return {
        "likelihood": (negative_log_likelihood(targets), lambda logits: -logits.log_softmax(1)[picked]),
        "divergence": (divergence_loss(teacher, beta=0.0), forward_kl),
        "policy gradient": (policy_gradient_loss(targets, advantages, old_logprobs=old), surrogate),
    }


@pytest.fixture(params=TILE_BYTES, ids=["16 tokens a tile", "20 tokens a tile", "one tile"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setattr(fused, "_TILE_BYTES", {"cpu": request.param})


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("loss", ["likelihood", "divergence", "policy gradient"])
@pytest.mark.parametrize("head", HEADS)
def test_sum_and_gradients_equal_those_of_the_full_logits(head, loss, weighted, tile_bytes):
    student, leaves = make_student(**HEADS[head])
    token_loss, definition = make_losses(student.head.vocab_size or VOCAB)[loss]
    weights = torch.linspace(0.0, 2.0, TOKENS).double() if weighted else None
    summed = sum_over_tokens(student, token_loss, weights=weights)
    values = definition(full_logits(student))
    expected = (values if weights is None else weights * values).sum()
    torch.testing.assert_close(summed.loss, expected, **TOLERANCE)
    torch.testing.assert_close(summed.values, values.detach(), **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(summed.loss, leaves), torch.autograd.grad(expected, leaves), **TOLERANCE
    )


def test_hidden_states_can_be_the_logits_and_cut_columns_get_no_gradient(tile_bytes):
    student, (hidden,) = make_student(weight=False, vocab_size=19)
    token_loss, definition = make_losses(19)["divergence"]
    (grad,) = torch.autograd.grad(sum_over_tokens(student, token_loss).loss, hidden)
    (expected,) = torch.autograd.grad(definition(hidden[:, :19]).sum(), hidden)
    torch.testing.assert_close(grad, expected, **TOLERANCE)
    assert (grad[:, 19:] == 0).all()


def test_the_gradient_is_scaled_by_what_comes_after(tile_bytes):
    student, leaves = make_student(bias=True)
    token_loss, _ = make_losses(VOCAB)["likelihood"]
    once = torch.autograd.grad(sum_over_tokens(student, token_loss).loss, leaves)
    other = torch.autograd.grad(-3 * sum_over_tokens(student, token_loss).loss / 7, leaves)
    torch.testing.assert_close(other, tuple(grad * -3 / 7 for grad in once), **TOLERANCE)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    student, leaves = make_student(bias=True)
    token_loss, definition = make_losses(VOCAB)["divergence"]
    for name, leaf in zip(["hidden", "weight", "bias"], leaves, strict=True):
        leaf.requires_grad_(name == trained)
    sum_over_tokens(student, token_loss).loss.backward()
    (leaf,) = (leaf for leaf in leaves if leaf.requires_grad)
    (expected,) = torch.autograd.grad(definition(full_logits(student)).sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected, **TOLERANCE)
    assert sum(tensor.grad is not None for tensor in leaves) == 1


def test_nothing_to_train_gives_a_value_without_a_graph():
    student, leaves = make_student()
    for leaf in leaves:
        leaf.requires_grad_(False)
    token_loss, definition = make_losses(VOCAB)["divergence"]
    loss = sum_over_tokens(student, token_loss).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, definition(full_logits(student)).sum(), **TOLERANCE)


@pytest.mark.parametrize("loss", ["likelihood", "divergence", "policy gradient"])
def test_no_tokens_give_a_zero_on_the_graph_with_zero_gradients(loss):
    student, leaves = make_student(bias=True)
    token_loss, _ = make_losses(VOCAB)[loss]
    summed = sum_over_tokens(Dense(student.hidden[:0], student.head), token_loss)
    assert summed.loss.requires_grad
    assert summed.loss.item() == 0.0
    grads = torch.autograd.grad(summed.loss, leaves)
    assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("loss", ["likelihood", "divergence", "policy gradient"])
def test_no_tokens_give_the_same_metrics_as_some(loss):
    """Every rank adds up the same names, whether or not it has a loss token."""
    student, _ = make_student()
    token_loss, _ = make_losses(VOCAB)[loss]
    some = sum_over_tokens(student, token_loss)
    none = sum_over_tokens(Dense(student.hidden[:0], student.head), token_loss)
    assert list(none.metrics) == list(some.metrics)
    assert all(column.shape == (0,) for column in (none.values, *none.metrics.values()))
    means = none.means(*none.metrics)
    assert all((float(numerator), denominator) == (0.0, 0) for numerator, denominator in means.values())


def test_splitting_or_reordering_tokens_changes_nothing():
    student, leaves = make_student(bias=True)
    teacher = make_teacher()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))

    def part(rows):
        mine = Dense(student.hidden[rows], dataclasses.replace(student.head, vocab_size=19))
        return sum_over_tokens(mine, divergence_loss(Dense(teacher.hidden[rows], teacher.head), beta=0.5)).loss

    whole = part(torch.arange(TOKENS))
    pieces = [part(order[start : start + 13]) for start in range(0, TOKENS, 13)]
    torch.testing.assert_close(sum(pieces), whole, **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad(sum(pieces), leaves), torch.autograd.grad(whole, leaves), **TOLERANCE
    )


def test_token_logprobs_are_those_of_the_full_logits(tile_bytes):
    student, _ = make_student(**HEADS["all at once"])
    targets = torch.randint(19, (TOKENS,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logprobs = token_logprobs(student, targets)
    expected = full_logits(student).log_softmax(1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logprobs, expected.detach(), **TOLERANCE)


@pytest.mark.parametrize("loss", ["likelihood", "divergence", "policy gradient"])
@pytest.mark.parametrize("head", HEADS)
def test_a_function_of_the_tokens_values_has_the_gradient_of_the_full_logits(head, loss, tile_bytes):
    student, leaves = make_student(**HEADS[head])
    token_loss, definition = make_losses(student.head.vocab_size or VOCAB)[loss]
    values, _ = token_values(student, token_loss)
    expected = definition(full_logits(student))
    torch.testing.assert_close(values, expected, **TOLERANCE)

    def of(values):  # not linear in them, as the loss of a pair is not
        return torch.nn.functional.softplus(values[::2].sum() - values[1::2].sum()) + values.square().sum()

    gradients = (torch.autograd.grad(of(column), leaves) for column in (values, expected))
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_log_probabilities_at_a_temperature_are_those_of_divided_logits(tile_bytes):
    student, leaves = make_student(**HEADS["all at once"])
    targets = torch.randint(19, (TOKENS,), generator=torch.Generator().manual_seed(2))
    logprobs = token_logprobs(student, targets, temperature=1.7)
    expected = (full_logits(student) / 1.7).log_softmax(1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logprobs, expected, **TOLERANCE)
    gradients = (torch.autograd.grad(column.sum(), leaves) for column in (logprobs, expected))
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_token_values_keep_no_logits_until_the_backward_pass(monkeypatch):
    """Saved for it are hidden states, head and bias; what else is as large as the logits is gone by then."""
    monkeypatch.setattr(fused, "_TILE_BYTES", {"cpu": 1})
    student, _ = make_student(bias=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        token_values(student, make_losses(VOCAB)["likelihood"][0])
    assert sorted(saved) == sorted([TOKENS * HIDDEN, VOCAB * HIDDEN, VOCAB])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_tokens_have_log_probabilities_of_the_same_dtype(dtype):
    student, _ = make_student(dtype)
    targets = torch.zeros(TOKENS, dtype=torch.long)
    none = token_logprobs(Dense(student.hidden[:0], student.head), targets[:0])
    assert none.shape == (0,)
    assert none.dtype == token_logprobs(student, targets).dtype


@pytest.mark.parametrize("head", ["plain", "all at once"])
@pytest.mark.parametrize("loss", ["likelihood", "divergence", "policy gradient"])
def test_bfloat16_inputs_are_summed_in_float32(loss, head, tile_bytes):
    """Only the multiplications by the head round to bfloat16 (8 bits): hence 2 % of the largest entry."""
    student, leaves = make_student(torch.bfloat16, **HEADS[head])
    token_loss, definition = make_losses(student.head.vocab_size or VOCAB)[loss]
    summed = sum_over_tokens(student, token_loss)
    assert summed.loss.dtype == summed.values.dtype == torch.float32
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    head = dataclasses.replace(student.head, weight=wide[1], bias=wide[2] if len(wide) > 2 else None)
    expected = definition(full_logits(Dense(wide[0], head))).sum()
    torch.testing.assert_close(summed.loss.double(), expected, rtol=1e-2, atol=0)
    grads = torch.autograd.grad(summed.loss, leaves)
    for grad, reference in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), reference, rtol=0, atol=0.02 * float(reference.abs().max()))


def test_logits_in_bfloat16_lose_nothing_beyond_their_own_rounding():
    """With the head outside, the loss sees rounded logits and computes in float32: float32's tolerance."""
    student, (hidden,) = make_student(torch.bfloat16, weight=False)
    token_loss, definition = make_losses(VOCAB)["divergence"]
    summed = sum_over_tokens(student, token_loss)
    torch.testing.assert_close(summed.values.double(), definition(hidden.detach().double()), rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returns, below autograd."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("teacher", ["dense", "none"])
def test_nothing_has_the_size_of_tokens_times_vocabulary(monkeypatch, teacher):
    tokens, hidden_size, vocab = 4096, 16, 8192
    monkeypatch.setattr(fused, "_TILE_BYTES", {"cpu": 2**20})
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    student = Dense(hidden, Head(weight))
    loss = (
        divergence_loss(Dense(hidden.detach(), Head(weight.detach() + 0.1)), beta=0.5)
        if teacher == "dense"
        else negative_log_likelihood(torch.zeros(tokens, dtype=torch.long))
    )
    with LargestTensor() as largest:
        sum_over_tokens(student, loss).loss.backward()
    assert hidden.grad is not None
    # The largest things are a tile of 32 tokens and the head's own gradient: a hundredth of [tokens, vocabulary].
    assert largest.elements <= max(2**20 // 4, vocab * hidden_size, tokens * hidden_size)
    assert 100 * largest.elements < tokens * vocab


def test_the_watch_for_large_tensors_sees_full_logits():
    hidden, weight = torch.randn(64, 4), torch.randn(32, 4)
    with LargestTensor() as largest:
        (hidden @ weight.T).logsumexp(1)
    assert largest.elements == 64 * 32


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 50])
def test_tiles_cover_every_token_once(tokens, monkeypatch):
    monkeypatch.setattr(fused, "_TILE_BYTES", {"cpu": 1})
    covered = [n for rows in fused.tiles(Dense(torch.zeros(tokens, 3), Head(None))) for n in range(tokens)[rows]]
    assert covered == list(range(tokens))


@pytest.mark.parametrize("cuts", [[], [5], [40, 45], list(range(50)), [1, 2, 33, 34]])
def test_a_tile_begins_only_where_it_may(cuts, monkeypatch):
    monkeypatch.setattr(fused, "_TILE_BYTES", {"cpu": 1})
    tiles = list(fused.tiles(Dense(torch.zeros(50, 3), Head(None)), cuts))
    assert [n for rows in tiles for n in range(50)[rows]] == list(range(50))
    assert all(rows.start in (0, *cuts) for rows in tiles)
    assert all(rows.start < rows.stop for rows in tiles)
