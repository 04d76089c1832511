"""Distances between groups of tokens of two vocabularies. The definition, written out naively, is the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives import (
    GroupedTokens,
    VocabularyMatch,
    fused,
    grouped_loss,
    hybrid_distance,
    sorted_distance,
    sum_over_tokens,
)
from opd.objectives.alignment import align
from opd.objectives.uld import sorted_l1
from opd.protocols import Dense, Head

FLOOR = 1e-8
seeds = st.integers(0, 2**31)


class Case:
    """Random scores and groups of a few sequences, numbered over the whole batch."""

    def __init__(self, seed, sequences=3, vocabularies=(7, 9), tokens=5):
        generator = torch.Generator().manual_seed(seed)

        def integer(low, high):
            return int(torch.randint(low, high, (), generator=generator))

        rows, starts = [], [0, 0]
        for owner in range(sequences):
            size = integer(2, 4 * tokens)
            ends = [
                sorted({*torch.randint(1, size + 1, (tokens,), generator=generator).tolist(), size}) for _ in range(2)
            ]
            rows += [(owner, a + starts[0], b + starts[0], c + starts[1], d + starts[1]) for a, b, c, d in align(*ends)]
            starts = [start + len(side) for start, side in zip(starts, ends, strict=True)]
        self.alignment = torch.tensor(rows)
        self.grouped = GroupedTokens.of(self.alignment)
        self.student, self.teacher = (
            torch.randn(count, width, generator=generator, dtype=torch.float64)
            for count, width in zip(starts, vocabularies, strict=True)
        )
        self.targets, self.teacher_targets = (
            torch.randint(0, width, (count,), generator=generator)
            for count, width in zip(starts, vocabularies, strict=True)
        )

    def loss(self, hidden, distance, head=None, **settings):
        token_loss = grouped_loss(
            self.grouped.groups,
            distance,
            targets=self.targets,
            teacher=Dense(self.teacher, Head(None)),
            teacher_targets=self.teacher_targets,
            **{"merge": "bayesian", **settings},
        )
        count = len(hidden)
        weights, cuts = self.grouped.token_weights(hidden, count), self.grouped.cuts(count)
        return sum_over_tokens(Dense(hidden, head or Head(None)), token_loss, weights=weights, cuts=cuts).loss


def merged(logits, targets, first, end, merge, temperature):
    probabilities = (logits / temperature).softmax(1)
    base, others = (end - 1, range(first, end - 1)) if merge == "bayesian" else (first, range(first + 1, end))
    kept = probabilities[base]
    for token in others:
        kept = kept * probabilities[token, targets[token]].clamp(min=FLOOR)
    return kept


def naive_sorted(p, q):
    size = max(len(p), len(q))
    p, q = (torch.cat([side.sort(descending=True).values, side.new_zeros(size - len(side))]) for side in (p, q))
    return (p - q).abs().sum()


def value_and_grad(function, logits):
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from(["bayesian", "observed"]), st.sampled_from([(1.0, 1.0), (2.0, 0.5)]))
def test_value_and_gradient_are_those_of_the_definition(seed, merge, temperatures):
    case = Case(seed)
    mine, theirs = temperatures

    def naive(logits):
        total = 0
        for owner in range(3):
            distances = [
                naive_sorted(
                    merged(logits, case.targets, a, b, merge, mine),
                    merged(case.teacher, case.teacher_targets, c, d, merge, theirs),
                )
                for row, a, b, c, d in case.alignment.tolist()
                if row == owner and a < b and c < d
            ]
            total = total + sum(distances) / len(distances)
        return total

    settings = {"merge": merge, "student_temperature": mine, "teacher_temperature": theirs}
    found = value_and_grad(lambda leaf: case.loss(leaf, sorted_distance, **settings), case.student)
    torch.testing.assert_close(found, value_and_grad(naive, case.student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_finite_differences(merge, beta):
    case = Case(5, vocabularies=(5, 6), tokens=3)
    match = VocabularyMatch(torch.tensor([4, 0, 2]), torch.tensor([1, 3, 5]))
    distance = hybrid_distance(match, beta=beta, matched_weight=0.7, unmatched_weight=0.4)
    assert torch.autograd.gradcheck(
        lambda leaf: case.loss(leaf, distance, merge=merge), case.student.requires_grad_(), eps=1e-6, atol=1e-7
    )


@settings(deadline=None, max_examples=20)
@given(seeds, st.booleans())
def test_gradient_of_a_row_sums_to_zero(seed, hybrid):
    case = Case(seed)
    match = VocabularyMatch(torch.arange(5), torch.arange(5))
    distance = hybrid_distance(match, beta=0.5, matched_weight=None, unmatched_weight=None)
    _, grad = value_and_grad(lambda leaf: case.loss(leaf, distance if hybrid else sorted_distance), case.student)
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(grad), dtype=grad.dtype), rtol=0, atol=1e-13)


def test_groups_are_never_torn_by_tiles(monkeypatch):
    case = Case(11, sequences=9, tokens=8)
    assert len(case.student) > 32
    head = Head(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    hidden = torch.randn(len(case.student), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at_once = value_and_grad(lambda leaf: case.loss(leaf, sorted_distance, head), hidden)
    monkeypatch.setitem(fused._TILE_BYTES, "cpu", 1)  # sixteen tokens at a time
    sizes = [rows.stop - rows.start for rows in fused.tiles(Dense(hidden, head), case.grouped.cuts(len(hidden)))]
    assert len(sizes) > 2
    torch.testing.assert_close(
        value_and_grad(lambda leaf: case.loss(leaf, sorted_distance, head), hidden), at_once, rtol=1e-12, atol=1e-14
    )


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 40), st.integers(2, 40))
def test_distance_without_merging_is_at_most_two(seed, student_width, teacher_width):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (20 * torch.randn(6, width, generator=generator, dtype=torch.float64)).softmax(1)
        for width in (student_width, teacher_width)
    )
    distance = sorted_l1(student, teacher)
    assert (distance >= 0).all()
    assert (distance <= 2 + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_a_permuted_vocabulary_is_at_distance_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 13, generator=generator, dtype=torch.float64)
    permuted = logits[:, torch.randperm(13, generator=generator)]
    torch.testing.assert_close(
        sorted_l1(logits.softmax(1), permuted.softmax(1)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_equal_distributions_have_no_distance_and_no_gradient():
    case = Case(3, vocabularies=(7, 7))
    case.teacher, case.teacher_targets = case.student, case.targets
    case.grouped = GroupedTokens.of(torch.tensor([(0, k, k + 1, k, k + 1) for k in range(len(case.student))]))
    match = VocabularyMatch(torch.arange(4), torch.arange(4))
    for distance in (sorted_distance, hybrid_distance(match, beta=0.5, matched_weight=1.0, unmatched_weight=1.0)):
        value, grad = value_and_grad(lambda leaf, d=distance: case.loss(leaf, d), case.student)
        assert abs(value) < 1e-14
        assert grad.abs().max() < 1e-14


def test_tokens_in_no_group_or_in_a_one_sided_one_receive_no_gradient():
    case = Case(4, sequences=1)
    case.grouped = GroupedTokens.of(torch.tensor([(0, 0, 1, 0, 1), (0, 1, 2, 1, 1)]))
    assert case.grouped.num_dropped == 1
    _, grad = value_and_grad(lambda leaf: case.loss(leaf, sorted_distance), case.student)
    assert grad[0].abs().sum() > 0
    assert (grad[1:] == 0).all()


def test_the_student_learns_its_factors_too():
    case = Case(4, sequences=1)
    case.grouped = GroupedTokens.of(torch.tensor([(0, 0, 2, 0, 1)]))
    _, grad = value_and_grad(lambda leaf: case.loss(leaf, sorted_distance), case.student)
    assert (grad[:2].abs().sum(1) > 0).all()


def test_no_groups_give_a_zero_that_hangs_on_the_graph():
    case = Case(4, sequences=1)
    case.grouped = GroupedTokens.of(torch.empty(0, 5, dtype=torch.long))
    value, grad = value_and_grad(lambda leaf: case.loss(leaf, sorted_distance), case.student)
    assert value == 0
    assert (grad == 0).all()


def test_weights_default_to_the_matched_share_of_the_teachers_columns():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, width, generator=generator).double().softmax(1) for width in (5, 8))
    match = VocabularyMatch(torch.tensor([1, 4]), torch.tensor([7, 0]))
    value, parts = hybrid_distance(match, beta=0.5, matched_weight=None, unmatched_weight=None)(student, teacher)
    expected = 2 / 8 * parts["matched_loss"] + 6 / 8 * parts["unmatched_loss"]
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        parts["unmatched_loss"], sorted_l1(student[:, [0, 2, 3]], teacher[:, 1:7]), rtol=1e-14, atol=0
    )


def test_matched_ids_past_a_models_columns_are_left_out():
    student, teacher = torch.full((1, 3), 1 / 3), torch.full((1, 3), 1 / 3)
    match = VocabularyMatch(torch.tensor([0, 1, 5]), torch.tensor([0, 3, 1]))
    _, parts = hybrid_distance(match, beta=0.0, matched_weight=1.0, unmatched_weight=1.0)(student, teacher)
    assert parts["matched_loss"].item() == 0
    assert parts["unmatched_loss"].item() == 0


def test_a_match_is_by_the_tokens_string():
    class Vocabulary(dict):
        def get_vocab(self):
            return dict(self)

    match = VocabularyMatch.between(Vocabulary(a=0, b=1, Ġa=2), Vocabulary({"b": 5, "▁a": 6, "a": 3}))
    assert (match.student_ids.tolist(), match.teacher_ids.tolist()) == ([0, 1], [3, 5])
    assert len(VocabularyMatch.between(Vocabulary(a=0), Vocabulary(b=0)).student_ids) == 0
