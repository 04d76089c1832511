"""MiniLLM against the methods it contains, and in expectation over every sequence of a small tabular language.

The student is a table of logits: a row for each prefix of up to two tokens, of four.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from opd.data.collate import lay_out
from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, TeacherNeed, TokenSequence

VOCAB, STEPS = 4, 3
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
PREFIXES = [prefix for length in range(STEPS) for prefix in itertools.product(range(VOCAB), repeat=length)]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
TOKENS = torch.tensor(list(itertools.product(range(VOCAB), repeat=STEPS)))
# (sequences, steps): the table's row that predicts each token.
ROWS = torch.tensor([[ROW[tuple(tokens[:step])] for step in range(STEPS)] for tokens in TOKENS.tolist()])

DEFAULTS = {
    "mode": "trl",
    "rkl_advantage": True,
    "single_step_decomposition": True,
    "use_distribution_distillation": None,
    "gamma": None,
    "length_normalization": True,
    "kd_temperature": 1.0,
    "clip_epsilon": None,
    "num_substeps": 1,
    "teacher_mix": None,
    "reward_scaling": None,
    "reward_clip": None,
    "whiten": None,
    "lm_coef": None,
    "kd_ratio": 0.5,
}


def make_method(**changes):
    return METHODS["minillm"](METHODS["minillm"].Config(name="minillm", **{**DEFAULTS, **changes}))


def make_sequence(row, tokens, scores, kind="single"):
    sequence = TokenSequence(row, [0], list(tokens), [True] * len(tokens), origin="student", kind=kind)
    sequence.token_scores = dict(scores)
    return sequence


def make_batch(sequences):
    layout = lay_out([sequence.student_view for sequence in sequences], pad_id=0)
    names = sequences[0].token_scores
    scores = {name: torch.cat([sequence.token_scores[name] for sequence in sequences]) for name in names}
    return Batch(sequences, layout, token_scores=scores)


def dense(logits):
    return Dense(logits, Head(None))


def logprobs_of(logits, targets, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@st.composite
def rollouts(draw, kinds=("single",)):
    """Student, old and teacher logits (tokens, V) and the sequences that the tokens belong to, scored."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=len(kinds), max_size=2 * len(kinds)).filter(any))
    lengths = lengths[: len(lengths) // len(kinds) * len(kinds)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, old, teacher = 2 * torch.randn(3, sum(lengths), VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    return student, old, teacher, targets, lengths


def scored(made, temperature=1.0):
    _, old, teacher, targets, lengths = made
    columns = [logprobs_of(logits, targets, temperature).split(lengths) for logits in (old, teacher)]
    return [
        make_sequence(row, tokens.tolist(), {"student_logprobs": mine, "teacher_logprobs": its})
        for row, (tokens, mine, its) in enumerate(zip(targets.split(lengths), *columns, strict=True))
    ]


def value_and_gradient(method, made, *, temperature=1.0, logits=None):
    """Of the method's sum over the tokens, after its window."""
    sequences = scored(made, temperature)
    if method.needs.window:
        method.window(sequences, lambda tensor: tensor)
    leaf = (made[0] if logits is None else logits).clone().requires_grad_()
    (term,) = method.loss(dense(leaf), {"teacher": dense(made[2])}, make_batch(sequences)).terms
    assert term.count == "tokens" and term.weight == 1.0
    return term.sum.detach(), torch.autograd.grad(term.sum, leaf)[0]


@settings(deadline=None, max_examples=30)
@given(rollouts(), st.sampled_from([0.7, 1.0, 2.0]))
def test_the_single_step_term_is_gkd_at_beta_one(made, temperature):
    ours = make_method(rkl_advantage=False, kd_temperature=temperature)
    config = METHODS["gkd"].Config(name="gkd", beta=1.0, lmbda=1.0, seq_kd=False, kd_temperature=temperature)
    gkd = value_and_gradient(METHODS["gkd"](config), made)
    torch.testing.assert_close(value_and_gradient(ours, made), gkd, **TOLERANCE)


def reverse_kl(**changes):
    config = METHODS["reverse_kl"].Config(
        **{
            "name": "reverse_kl",
            "kl_coef": 1.0,
            "kl_discount": 0.0,
            "num_substeps": 1,
            "importance_ratio": True,
            "clip_epsilon": None,
            "center_advantages": False,
            **changes,
        }
    )
    return METHODS["reverse_kl"](config)


@settings(deadline=None, max_examples=30)
@given(rollouts(), st.booleans(), st.booleans())
def test_without_discount_and_single_step_it_is_reverse_kl(made, length_normalization, substeps):
    """With substeps the student has moved away from the old one, and both clip the ratio."""
    ours = make_method(
        single_step_decomposition=False,
        length_normalization=length_normalization,
        num_substeps=2 if substeps else 1,
    )
    theirs = reverse_kl(clip_epsilon=0.2 if substeps else None)
    logits = made[0] if substeps else made[1]
    torch.testing.assert_close(
        value_and_gradient(ours, made, logits=logits), value_and_gradient(theirs, made, logits=logits), **TOLERANCE
    )


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from([0.0, 0.5, 1.0]))
def test_without_length_normalization_it_is_reverse_kl_with_that_discount(made, discount):
    ours = make_method(single_step_decomposition=False, length_normalization=False, gamma=discount)
    torch.testing.assert_close(
        value_and_gradient(ours, made), value_and_gradient(reverse_kl(kl_discount=discount), made), **TOLERANCE
    )


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from([0.7, 2.0]), st.sampled_from([0.0, 0.95]))
def test_a_temperature_is_a_division_of_all_logits(made, temperature, gamma):
    student, old, teacher, targets, lengths = made
    hot = value_and_gradient(make_method(kd_temperature=temperature, gamma=gamma), made, temperature=temperature)
    divided = (student / temperature, old / temperature, teacher / temperature, targets, lengths)
    value, grad = value_and_gradient(make_method(gamma=gamma), divided)
    torch.testing.assert_close(hot, (value, grad / temperature), **TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from(["trl", "paper"]), st.sampled_from([0.0, 0.95, 1.0]))
def test_both_terms_together_are_the_sum_of_each_alone(made, mode, gamma):
    both, pg, single = (
        value_and_gradient(
            make_method(mode=mode, gamma=gamma, teacher_mix=0.0, rkl_advantage=a, single_step_decomposition=b), made
        )
        for a, b in ((True, True), (True, False), (False, True))
    )
    torch.testing.assert_close(both, tuple(x + y for x, y in zip(pg, single, strict=True)), **TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from(["trl", "paper", "lmops"]))
def test_a_student_equal_to_its_teacher_stays(made, mode):
    student, _, _, targets, lengths = made
    same = (student, student, student, targets, lengths)
    value, grad = value_and_gradient(make_method(mode=mode, gamma=0.95, teacher_mix=0.0, whiten=False), same)
    assert abs(float(value)) < 1e-12 and float(grad.abs().max()) < 1e-12


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from(["trl", "paper", "lmops"]))
def test_the_order_of_the_sequences_changes_nothing(made, mode):
    """Nor does the padding of a window, which goes with the longest of them; whitening is over tokens, not slots."""
    student, old, teacher, targets, lengths = made
    turned = [torch.cat(column.split(lengths)[::-1]) for column in (student, old, teacher, targets)]
    method = make_method(mode=mode, gamma=0.95, teacher_mix=0.0)
    value, grad = value_and_gradient(method, made)
    turned_value, turned_grad = value_and_gradient(method, (*turned, lengths[::-1]))
    torch.testing.assert_close(turned_value, value, **TOLERANCE)
    torch.testing.assert_close(turned_grad, torch.cat(grad.split(lengths)[::-1]), **TOLERANCE)


@pytest.fixture
def tables():
    """Logits of the student (trained) and of the teacher, by prefix."""
    generator = torch.Generator().manual_seed(11)
    student, teacher = torch.randn(2, len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def mixed(student, teacher, share, temperature):
    """(sequences, steps): probability of each token under (1 - α) π + α p."""
    mine, its = (logprobs_of(table.detach()[ROWS], TOKENS, temperature).exp() for table in (student, teacher))
    return (1 - share) * mine + share * its


def expected_gradient(method, student, teacher):
    """The expectation, over sequences of the method's sampler, of the gradient of its summed loss."""
    config = method.config
    old, its = (logprobs_of(table.detach()[ROWS], TOKENS, config.kd_temperature) for table in (student, teacher))
    sampler = mixed(student, teacher, config.teacher_mix, config.kd_temperature)
    probabilities = sampler.prod(1)
    sequences = [
        make_sequence(
            number,
            tokens,
            {
                "student_logprobs": old[number],
                "teacher_logprobs": its[number],
                "sampler_logprobs": sampler[number].log(),
            },
        )
        for number, tokens in enumerate(TOKENS.tolist())
    ]
    if method.needs.window:
        method.window(sequences, lambda tensor: tensor)
    loss = torch.zeros((), dtype=torch.float64)
    for number, sequence in enumerate(sequences):
        teachers = {"teacher": dense(teacher[ROWS[number]])}
        (term,) = method.loss(dense(student[ROWS[number]]), teachers, make_batch([sequence])).terms
        loss = loss + probabilities[number] * term.sum
    return torch.autograd.grad(loss, student)[0]


def token_kl_gradient(student, teacher, share=0.0, temperature=1.0):
    """Of Σ_prefix P(prefix) KL(π ‖ p), the prefixes' probabilities, the sampler's, held fixed."""
    reached = torch.ones(len(PREFIXES), dtype=torch.float64)
    sampler = mixed(student, teacher, share, temperature)
    for step in range(1, STEPS):
        reached[ROWS[:, step]] = sampler[:, :step].prod(1)
    logprobs, its = ((table / temperature).log_softmax(1) for table in (student, teacher))
    kl = (logprobs.exp() * (logprobs - its)).sum(1)
    return torch.autograd.grad((reached * kl).sum(), student)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("terms", ["policy gradient", "single step"])
def test_without_discount_either_term_is_in_expectation_the_gradient_of_the_token_kl(tables, terms, share, temperature):
    """So both together count it twice; under a mixed sampler the importance weight makes up for the teacher's share."""
    student, teacher = tables
    pg = terms == "policy gradient"
    method = make_method(
        gamma=0.0,
        teacher_mix=share,
        kd_temperature=temperature,
        rkl_advantage=pg,
        single_step_decomposition=not pg,
    )
    torch.testing.assert_close(
        expected_gradient(method, student, teacher),
        token_kl_gradient(student, teacher, share, temperature),
        **TOLERANCE,
    )


def test_the_papers_two_terms_are_together_the_gradient_of_the_kl_of_sequences(tables):
    """The paper's derivation, before length normalisation and off-policy sampling: single step + what comes later."""
    student, teacher = tables
    method = make_method(mode="paper", length_normalization=False, teacher_mix=0.0)
    logprobs = logprobs_of(student[ROWS], TOKENS).sum(1)
    kl = (logprobs.exp() * (logprobs - logprobs_of(teacher[ROWS], TOKENS).sum(1))).sum()
    torch.testing.assert_close(
        expected_gradient(method, student, teacher), torch.autograd.grad(kl, student)[0], **TOLERANCE
    )


def test_the_papers_policy_gradient_weighs_the_mean_reward_of_the_remaining_tokens(tables):
    """Σ_t w_t · mean(r_{t+1}, …) · ∇log π(y_t), over what (1-α) π + α p draws; the last token is credited with nothing."""
    student, teacher = tables
    old, its = (logprobs_of(table.detach()[ROWS], TOKENS) for table in (student, teacher))
    sampler = mixed(student, teacher, 0.2, 1.0)
    rewards, weights = its - old, old.exp() / sampler
    credit = torch.stack([rewards[:, 1:].mean(1), rewards[:, 2], torch.zeros(len(TOKENS)).double()], dim=1)
    surrogate = -(sampler.prod(1)[:, None] * weights * credit * logprobs_of(student[ROWS], TOKENS)).sum()
    method = make_method(mode="paper", single_step_decomposition=False)
    torch.testing.assert_close(
        expected_gradient(method, student, teacher), torch.autograd.grad(surrogate, student)[0], **TOLERANCE
    )


@settings(deadline=None, max_examples=20)
@given(rollouts(), st.sampled_from(["paper", "lmops"]))
def test_the_paper_clips_the_ratio_and_its_code_the_ratio_times_the_weight(made, mode):
    student, old, teacher, targets, _ = made
    method = make_method(mode=mode, teacher_mix=0.4, single_step_decomposition=False, whiten=False)
    sequences = scored(made)
    sampler = (0.6 * logprobs_of(old, targets).exp() + 0.4 * logprobs_of(teacher, targets).exp()).log()
    for sequence, values in zip(sequences, sampler.split(made[4]), strict=True):
        sequence.token_scores["sampler_logprobs"] = values
    method.window(sequences, lambda tensor: tensor)
    batch = make_batch(sequences)
    ratio, weight = (
        (logprobs_of(student, targets) - logprobs_of(old, targets)).exp(),
        (logprobs_of(old, targets) - sampler).exp(),
    )
    advantage = batch.token_scores["advantages"] / (weight if mode == "paper" else 1.0)
    if mode == "paper":
        surrogate = weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    else:
        surrogate = torch.minimum(ratio * weight * advantage, (ratio * weight).clamp(0.8, 1.2) * advantage)
    (term,) = method.loss(dense(student), {"teacher": dense(teacher)}, batch).terms
    torch.testing.assert_close(term.sum, -surrogate.sum(), **TOLERANCE)


def corpus_batch(method, made):
    """Rows of a rollout ("response", scored) and the data's own completion ("single", not sampled)."""
    sequences = scored(made)
    for number, sequence in enumerate(sequences):
        sequence.row, sequence.kind = number // 2, ("response", "single")[number % 2]
        sampled = sequence.kind == "response"
        sequence.token_scores["sampler_logprobs"] = (sequence.token_scores["student_logprobs"] - 0.1) * sampled
    method.window(sequences, lambda tensor: tensor)
    return make_batch(sequences)


@settings(deadline=None, max_examples=20)
@given(rollouts(kinds=("response", "single")), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_corpus_term_is_the_cross_entropy_to_the_data_and_to_the_teacher(made, kd_ratio):
    """Its gradient; as a value the teacher's part is a KL, which lies the teacher's entropy below."""
    method = make_method(mode="paper", lm_coef=0.7, kd_ratio=kd_ratio)
    leaf, teacher = made[0].clone().requires_grad_(), made[2]
    batch = corpus_batch(method, made)
    rollout, corpus = method.loss(dense(leaf), {"teacher": dense(teacher)}, batch).terms
    assert [(term.count, term.weight) for term in (rollout, corpus)] == [
        ("response_tokens", 1.0),
        ("single_tokens", 0.7),
    ]
    chosen = batch.tokens_of("single")
    hard = F.cross_entropy(leaf[chosen], batch.layout.targets[chosen], reduction="sum")
    soft = F.cross_entropy(leaf[chosen], teacher[chosen].softmax(1), reduction="sum")
    entropy = -(teacher[chosen].softmax(1) * teacher[chosen].log_softmax(1)).sum()
    expected = (1 - kd_ratio) * hard + kd_ratio * soft
    torch.testing.assert_close(corpus.sum, expected - kd_ratio * entropy, **TOLERANCE)
    (grad,) = torch.autograd.grad(corpus.sum, leaf, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0], **TOLERANCE)
    (grad,) = torch.autograd.grad(rollout.sum, leaf)
    assert (grad[chosen] == 0).all()


@settings(deadline=None, max_examples=20)
@given(rollouts(kinds=("response", "single")))
def test_beside_a_corpus_the_rollouts_are_trained_as_without_it(made):
    with_corpus = make_method(mode="paper", lm_coef=0.7)
    batch = corpus_batch(with_corpus, made)
    tokens = batch.tokens_of("response")
    term = with_corpus.loss(dense(made[0]), {"teacher": dense(made[2])}, batch).terms[0]

    alone = make_method(mode="paper")
    sequences = [sequence for sequence in batch.sequences if sequence.kind == "response"]
    for sequence in sequences:
        sequence.kind = "single"
        del sequence.token_scores["advantages"]
    alone.window(sequences, lambda tensor: tensor)
    (same,) = alone.loss(dense(made[0][tokens]), {"teacher": dense(made[2][tokens])}, make_batch(sequences)).terms
    torch.testing.assert_close(term.sum, same.sum, **TOLERANCE)


@settings(deadline=None, max_examples=10)
@given(rollouts(kinds=("response", "single")))
def test_every_sequence_of_a_window_has_the_same_scores_and_the_datas_are_zero(made):
    batch = corpus_batch(make_method(mode="lmops", lm_coef=1.0), made)
    assert len({tuple(sorted(sequence.token_scores)) for sequence in batch.sequences}) == 1
    for sequence in batch.sequences:
        assert {len(column) for column in sequence.token_scores.values()} == {sequence.num_loss_tokens}
        if sequence.kind == "single":
            assert (sequence.token_scores["advantages"] == 0).all()


def test_the_windows_metrics_are_means_over_the_rollouts_tokens(tables):
    student, teacher = tables
    old, its = (logprobs_of(table.detach()[ROWS], TOKENS)[:5] for table in (student, teacher))
    sampler = mixed(student, teacher, 0.2, 1.0)[:5].log()
    sequences = [
        make_sequence(
            number,
            TOKENS[number].tolist(),
            {"student_logprobs": old[number], "teacher_logprobs": its[number], "sampler_logprobs": sampler[number]},
        )
        for number in range(5)
    ]
    metrics = make_method(teacher_mix=0.2, single_step_decomposition=False).window(sequences, lambda tensor: tensor)
    weights = (old - sampler).exp()
    assert metrics == pytest.approx(
        {
            "advantage_mean": float((its - old).mean()),
            "advantage_std": float((its - old).std(correction=0)),
            "is_weight_mean": float(weights.mean()),
            "reverse_kl": float((weights * (old - its)).mean()),
        },
        rel=1e-9,
    )


def test_the_losses_metrics_are_its_parts(tables):
    student, teacher = tables
    old, its = (logprobs_of(table.detach()[ROWS], TOKENS)[0] for table in (student, teacher))
    method = make_method()
    sequence = make_sequence(0, TOKENS[0].tolist(), {"student_logprobs": old, "teacher_logprobs": its})
    assert "reverse_kl" not in method.window([sequence], lambda tensor: tensor)  # the exact one is in the loss
    terms = method.loss(dense(student[ROWS[0]]), {"teacher": dense(teacher[ROWS[0]])}, make_batch([sequence]))
    means = {name: float(numerator) / float(denominator) for name, (numerator, denominator) in terms.metrics.items()}
    logprobs, others = student.detach()[ROWS[0]].log_softmax(1), teacher[ROWS[0]].log_softmax(1)
    kl = float((logprobs.exp() * (logprobs - others)).sum(1).mean())
    assert means["loss_pg"] == pytest.approx(float((old - its).mean()))
    assert means["loss_single_step"] == means["reverse_kl"] == pytest.approx(kl)
    assert means["clip_fraction"] == 0.0 and means["ratio_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": "trl"}, {"gamma": 0.0, "teacher_mix": 0.0, "clip_epsilon": None, "whiten": False}),
        ({"mode": "trl", "num_substeps": 4}, {"gamma": 0.0, "clip_epsilon": 0.2}),
        ({"mode": "paper"}, {"gamma": 1.0, "teacher_mix": 0.2, "clip_epsilon": 0.2, "reward_scaling": 1.0}),
        ({"mode": "lmops"}, {"gamma": 0.95, "reward_scaling": 0.5, "reward_clip": 100.0, "whiten": True}),
        ({"mode": "paper", "gamma": 0.5, "teacher_mix": 0.0}, {"gamma": 0.5, "teacher_mix": 0.0}),
        ({"use_distribution_distillation": False}, {"single_step_decomposition": False}),
    ],
)
def test_what_is_left_null_is_the_modes_own(changes, expected):
    config = make_method(**changes).config
    assert {name: getattr(config, name) for name in expected} == expected
    assert type(config)(**config.model_dump()) == config


def test_a_method_without_either_term_is_refused():
    with pytest.raises(ValidationError, match=r"method\.rkl_advantage is false too") as refused:
        make_method(rkl_advantage=False, single_step_decomposition=False)
    assert refused.value.errors()[0]["loc"] == ("single_step_decomposition",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["method.gamma=0"]),
        ({"gamma": 0.5}, []),
        ({"rkl_advantage": False}, []),
        ({"gamma": 0.5, "use_distribution_distillation": True}, ["method.use_distribution_distillation"]),
        ({"mode": "paper"}, ["method.lm_coef=null"]),
        ({"mode": "paper", "lm_coef": 1.0, "gamma": 0.0}, []),
        ({"mode": "paper", "lm_coef": 1.0, "single_step_decomposition": False}, ["method.mode=paper"]),
    ],
)
def test_notes_name_what_is_legal_and_surprising(changes, expected):
    notes = make_method(**changes).notes()
    assert [note.startswith(start) for note, start in zip(notes, expected, strict=True)] == [True] * len(expected)


def test_a_corpus_asks_for_completions_and_stands_beside_the_rollout():
    method = make_method(mode="paper", lm_coef=1.0)
    assert method.needs.completions == "required"
    assert [(kind, method.origin(0.0, kind)) for kind in method.needs.sequences] == [
        ("response", "mixture"),
        ("single", "dataset"),
    ]
    assert method.needs.teacher_share == 0.2


def test_alone_the_rollout_is_the_students_and_no_completion_is_read():
    method = make_method(kd_temperature=2.0)
    assert method.needs.completions == "unused" and method.needs.window_temperature == 2.0
    assert [(kind, method.origin(0.0, kind)) for kind in method.needs.sequences] == [("single", "student")]


def test_the_policy_gradient_alone_asks_the_teacher_for_one_number_a_token():
    assert make_method(single_step_decomposition=False).needs.teachers == {"teacher": TeacherNeed("logprobs")}
    assert make_method().needs.teachers == {"teacher": TeacherNeed("dense")}
    assert make_method(rkl_advantage=False).needs.window is False
