"""Gold against gkd, with which it shares its limit; what it asks for; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.data.collate import lay_out
from opd.data.walk_tokenizer import build_tokenizer
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.objectives import VocabularyMatch
from opd.objectives.alignment import align
from opd.protocols import Batch, Dense, Head, TokenSequence

DEFAULTS = {
    "beta": 0.5,
    "lmbda": 0.5,
    "seq_kd": False,
    "kd_temperature": 1.0,
    "teacher_temperature": None,
    "use_uld_loss": None,
    "extended": True,
    "merge": "bayesian",
    "hybrid": False,
    "matched_weight": None,
    "unmatched_weight": None,
    "skip_student_eos": True,
    "skip_teacher_eos": True,
    "ce_weight": 0.0,
    "distill_weight": 1.0,
}


def gold(**changes):
    method = METHODS["gold"]
    return method(method.Config(name="gold", **{**DEFAULTS, **changes}))


def gkd(beta, temperature):
    method = METHODS["gkd"]
    return method(method.Config(name="gkd", beta=beta, lmbda=0.5, seq_kd=False, kd_temperature=temperature))


def one_tokenizer(seed, width=8):
    """A batch of three sequences (one without loss tokens), and logits of student and teacher for its loss tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [*torch.randint(1, 6, (2,), generator=generator).tolist(), 0]
    sequences = [
        TokenSequence(row, [0, 1], torch.randint(0, width, (n,), generator=generator).tolist(), [True] * n)
        for row, n in enumerate(lengths)
    ]
    layout = lay_out([sequence.student_view for sequence in sequences], pad_id=0)
    logits = torch.randn(2, sum(lengths), width, generator=generator, dtype=torch.float64)
    return sequences, layout, logits[0], logits[1]


def value_and_grad(method, student, teacher, batch):
    leaf = student.clone().requires_grad_()
    counts = {"tokens": len(student), **method.counts(batch.sequences)}
    terms = method.loss(Dense(leaf, Head(None)), {"teacher": Dense(teacher, Head(None))}, batch).terms
    loss = sum(term.weight * term.sum / counts[term.count] for term in terms)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


betas = st.sampled_from([0.0, 0.3, 0.5, 1.0])
temperatures = st.sampled_from([1.0, 2.0])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), betas, temperatures)
def test_identical_tokens_give_gkd_averaged_per_sequence(seed, beta, temperature):
    sequences, layout, student, teacher = one_tokenizer(seed)
    singles = torch.tensor([(int(owner), k, k + 1, k, k + 1) for k, owner in enumerate(layout.owner)])
    ours = gold(
        beta=beta, kd_temperature=temperature, use_uld_loss=True, hybrid=True, matched_weight=1.0, unmatched_weight=0.0
    )
    ours.match = VocabularyMatch(torch.arange(8), torch.arange(8))
    found = value_and_grad(ours, student, teacher, Batch(sequences, layout, {"teacher": layout}, {"teacher": singles}))
    lengths = torch.bincount(layout.owner, minlength=3).double()
    per_sequence = len(student) / (3 * lengths[layout.owner])  # 1 / tokens becomes 1 / (sequences · own length)
    expected = value_and_grad(gkd(beta, temperature), student, teacher, Batch(sequences, layout, weights=per_sequence))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), betas, temperatures)
def test_without_uld_it_is_gkd(seed, beta, temperature):
    sequences, layout, student, teacher = one_tokenizer(seed)
    batch = Batch(sequences, layout)
    found = value_and_grad(gold(use_uld_loss=False, beta=beta, kd_temperature=temperature), student, teacher, batch)
    assert all(map(torch.equal, found, value_and_grad(gkd(beta, temperature), student, teacher, batch)))


def test_nll_is_added_as_a_mean_over_tokens():
    sequences, layout, student, teacher = one_tokenizer(1)
    batch = Batch(sequences, layout)
    value, _ = value_and_grad(gold(use_uld_loss=False, ce_weight=0.3, distill_weight=2.0), student, teacher, batch)
    distilled, _ = value_and_grad(gold(use_uld_loss=False), student, teacher, batch)
    nll = torch.nn.functional.cross_entropy(student, layout.targets)
    torch.testing.assert_close(value, 2 * distilled + 0.3 * nll, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_a_split_into_micro_batches_changes_nothing(seed):
    """The sums over two micro-batches, divided by the common counts, are those of one."""
    generator = torch.Generator().manual_seed(seed)
    sequences, views, alignment, starts = [], [], [], [0, 0]
    for row in range(4):
        ends = [sorted({*torch.randint(1, 7, (4,), generator=generator).tolist(), 7}) for _ in range(2)]
        mine, theirs = map(len, ends)
        sequences.append(TokenSequence(row, [0], [1] * mine, [True] * mine))
        views.append([1] * theirs)
        alignment.append([(row, *group) for group in align(*ends)])
        starts = [starts[0] + mine, starts[1] + theirs]
    student, teacher = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in starts)

    def summed(rows):
        chosen = [sequences[row] for row in rows]
        layout = lay_out([sequence.student_view for sequence in chosen], pad_id=0)
        seen = [TokenSequence(0, [0], views[row], [True] * len(views[row])).student_view for row in rows]
        groups, at = [], [0, 0]
        for number, row in enumerate(rows):
            groups += [(number, a + at[0], b + at[0], c + at[1], d + at[1]) for _, a, b, c, d in alignment[row]]
            at = [at[0] + len(sequences[row].completion_ids), at[1] + len(views[row])]
        before = [sum(len(s.completion_ids) for s in sequences[: rows[0]]), sum(map(len, views[: rows[0]]))]
        batch = Batch(chosen, layout, {"teacher": lay_out(seen, pad_id=0)}, {"teacher": torch.tensor(groups)})
        scores = student[before[0] : before[0] + at[0]], teacher[before[1] : before[1] + at[1]]
        value, grad = value_and_grad(gold(use_uld_loss=True), *scores, batch)
        return value * len(rows), grad * len(rows)

    whole, parts = summed(range(4)), [summed(range(2)), summed(range(2, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1], rtol=1e-12, atol=1e-14)


def test_uld_is_used_where_the_tokenizers_differ_unless_it_is_said():
    student, teacher = build_tokenizer(430), build_tokenizer(512)
    for setting, other, expected in [
        (None, student, False),
        (None, teacher, True),
        (True, student, True),
        (False, teacher, False),
    ]:
        method = gold(use_uld_loss=setting, merge="observed")
        method.prepare(student, other)
        assert (method.needs.alignment is not None, method.needs.label_states) == (expected, expected)
        assert (method.needs.alignment is not None) == expected


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"merge": "observed", "ce_weight": 0.1}, "method.ce_weight=0.1"),
        ({"hybrid": True, "matched_weight": 0.5}, "method.matched_weight=0.5"),
        ({"seq_kd": True}, "method.seq_kd=true"),
        ({"loss_normalization": "sum"}, "method.loss_normalization=sum"),
        ({"use_uld_loss": False, "teacher_temperature": 2.0}, "method.teacher_temperature=2.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_with_the_key(settings, key):
    with pytest.raises(ConfigError) as refused:
        gold(**settings).prepare(build_tokenizer(430), build_tokenizer(512))
    assert str(refused.value).startswith(f"{key}: ")
    assert "; set " in str(refused.value) or "; give " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_tokenizer_allows_what_uld_does_not():
    tokenizer = build_tokenizer(430)
    gold(seq_kd=True, loss_normalization="sum").prepare(tokenizer, tokenizer)
