"""Dpo, dckd and adpa on pairs whose logits are given: terms, counts and gradients, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from opd.data.collate import lay_out
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.objectives import token_logprobs
from opd.protocols import Batch, Dense, Head, TeacherNeed, TokenSequence

VOCAB = 7
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# (prompt, chosen, the other answer); the second pair's chosen answer has a token that is no target.
ROWS = [
    ([1, 2, 3], ([4, 5, 6], [True] * 3), ([5, 0], [True] * 2)),
    ([0], ([2, 2, 3, 1], [True, False, True, True]), ([6], [True])),
    ([3, 3], ([1], [True]), ([2, 4, 4, 5, 1], [True] * 5)),
]
SETTINGS = {
    "dpo": {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "average_log_prob": False,
        "reference_free": False,
        "sft_weight": 0.0,
        "precompute_reference": False,
        "sanity_check": False,
    },
    "dckd": {
        "sft_on_chosen": 1.0,
        "distillation_weight": 1.0,
        "chosen_distil_weight": 0.1,
        "rejected_distil_weight": 0.2,
        "dpo_teacher": None,
        "top_k": None,
        "released_quirks": False,
    },
    "adpa": {
        "sft_on_chosen": 1.0,
        "dpo_weight": 0.0,
        "distillation_weight": 0.0,
        "chosen_distil_weight": 0.0,
        "rejected_distil_weight": 0.0,
        "adpa_weight": 1.6,
        "kl_penalty_weight": 0.0,
        "beta": 0.3,
        "label_smoothing": 0.0,
        "top_k": None,
        "advantage_clip": None,
        "released_quirks": False,
        "responses": "stored",
        "scores": None,
        "dpo_teacher": None,
        "ref_teacher": "some/folder",
    },
}
EVERY_TERM = {
    "dpo_weight": 0.5,
    "distillation_weight": 2.0,
    "chosen_distil_weight": 0.1,
    "rejected_distil_weight": 0.2,
    "kl_penalty_weight": 0.7,
}


def make(name, **settings):
    return METHODS[name](METHODS[name].Config(name=name, **{**SETTINGS[name], **settings}))


def make_sequences(other, rows=ROWS):
    sequences = []
    for number, (prompt, chosen, second) in enumerate(rows):
        sequences.append(TokenSequence(number, prompt, *chosen, kind="chosen"))
        sequences.append(TokenSequence(number, prompt, *second, kind=other))
    return sequences


class Case:
    """Sequences with the logits of a student, two teachers and a reference at every position."""

    def __init__(self, other, rows=ROWS, seed=0):
        self.sequences = make_sequences(other, rows)
        self.layout = lay_out([sequence.student_view for sequence in self.sequences], pad_id=0)
        generator = torch.Generator().manual_seed(seed)
        shape = (4, *self.layout.input_ids.shape, VOCAB)
        self.student, *rest = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.dpo, self.ref, self.reference = rest

    def dense(self, logits):
        return Dense(logits.flatten(0, 1)[self.layout.predictors], Head(None))

    def batch(self, weights=None):
        scores = {"reference_logprobs": token_logprobs(self.dense(self.reference), self.layout.targets)}
        return Batch(self.sequences, self.layout, token_scores=scores, weights=weights)

    def terms(self, method, student=None, weights=None):
        teachers = {"dpo_teacher": self.dense(self.dpo), "ref_teacher": self.dense(self.ref)}
        asked = {name: teachers[name] for name in method.needs.teachers if name in teachers}
        return method.loss(self.dense(self.student if student is None else student), asked, self.batch(weights))

    def counts(self, method):
        kinds = {kind: [s for s in self.sequences if s.kind == kind] for kind in method.needs.sequences}
        tokens = {f"{kind}_tokens": sum(s.num_loss_tokens for s in mine) for kind, mine in kinds.items()}
        return {**tokens, **method.counts(self.sequences)}

    def loss_and_grad(self, method, weights=None):
        leaf, counts = self.student.clone().requires_grad_(), self.counts(method)
        terms = self.terms(method, leaf, weights).terms
        loss = sum(term.weight * term.sum / counts[term.count] for term in terms)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    def by_hand(self, logits, row):
        """log-softmax rows that predict a sequence's loss tokens, and these tokens."""
        view = self.sequences[row].student_view
        wanted = [t for t in range(1, len(view.ids)) if view.loss_mask[t]]
        return logits[row, [t - 1 for t in wanted]].log_softmax(1), torch.tensor([view.ids[t] for t in wanted])

    def logp(self, logits, row):
        logprobs, tokens = self.by_hand(logits, row)
        return logprobs[torch.arange(len(tokens)), tokens].sum()

    def over_tokens(self, kind, value):
        """The mean of value(student's, dpo's, ref's log-softmax, tokens), (tokens,), over all tokens of a kind."""
        values = []
        for row, sequence in enumerate(self.sequences):
            if sequence.kind == kind:
                parts = [self.by_hand(logits, row) for logits in (self.student, self.dpo, self.ref)]
                values.append(value(*[logprobs for logprobs, _ in parts], parts[0][1]))
        return torch.cat(values).mean()


def nll(student, dpo, ref, tokens):
    return -student[torch.arange(len(tokens)), tokens]


def forward_kl(student, dpo, ref, tokens):
    return (dpo.exp() * (dpo - student)).sum(1)


def advantage(student, dpo, ref, tokens):
    return (student.exp() * (dpo - ref)).sum(1)


def scalar(metric):
    return float(metric[0]) / float(metric[1])


METHOD_CASES = [
    ("dpo", "rejected", {}),
    ("dpo", "rejected", {"sft_weight": 0.5, "label_smoothing": 0.1}),
    ("dckd", "rejected", {}),
    ("dckd", "rejected", {"top_k": 3}),
    ("adpa", "response", {}),
    ("adpa", "response", {"top_k": 3, "advantage_clip": [-1.0, 1.0]}),
    ("adpa", "response", EVERY_TERM),
]


@pytest.mark.parametrize("name, other, settings", METHOD_CASES)
def test_prompt_tokens_and_padding_receive_no_gradient_and_every_target_does(name, other, settings):
    case = Case(other)
    _, grad = case.loss_and_grad(make(name, **settings))
    touched = grad.abs().sum(2).flatten() > 0
    scored = torch.zeros_like(touched)
    scored[case.layout.predictors] = True
    assert torch.equal(touched, scored)


@pytest.mark.parametrize("name, other, settings", METHOD_CASES)
def test_the_gradient_of_a_positions_logits_sums_to_zero(name, other, settings):
    _, grad = Case(other).loss_and_grad(make(name, **settings))
    torch.testing.assert_close(grad.sum(2), torch.zeros_like(grad.sum(2)), **TOLERANCE)


@pytest.mark.parametrize("name, other, settings", METHOD_CASES)
def test_terms_of_parts_of_a_batch_add_up_to_those_of_the_whole(name, other, settings):
    method, whole = make(name, **settings), Case(other)
    width = whole.layout.input_ids.shape[1]
    expected = whole.terms(method)
    sums, metrics = (
        [torch.zeros((), dtype=torch.float64) for _ in expected.terms],
        dict.fromkeys(expected.metrics, (0, 0)),
    )
    for number in range(len(ROWS)):
        part = Case(other, ROWS[number : number + 1])
        length = part.layout.input_ids.shape[1]
        for name in ("student", "dpo", "ref", "reference"):
            setattr(part, name, getattr(whole, name)[2 * number : 2 * number + 2, :length])
        assert length <= width
        made = part.terms(method)
        sums = [total + term.sum for total, term in zip(sums, made.terms, strict=True)]
        metrics = {k: (metrics[k][0] + made.metrics[k][0], metrics[k][1] + made.metrics[k][1]) for k in metrics}
    torch.testing.assert_close(sums, [term.sum for term in expected.terms], **TOLERANCE)
    for key, (numerator, denominator) in expected.metrics.items():
        assert float(metrics[key][0]) == pytest.approx(float(numerator), rel=1e-10)
        assert metrics[key][1] == denominator


@pytest.mark.parametrize("name, other, settings", METHOD_CASES)
def test_a_pair_without_tokens_changes_nothing(name, other, settings):
    empty = ([1, 2], ([], []), ([], []))
    method, with_it, without = make(name, **settings), Case(other, [empty, *ROWS]), Case(other)
    for logits in ("student", "dpo", "ref", "reference"):
        getattr(with_it, logits)[2:] = getattr(without, logits)
    assert with_it.counts(method) == without.counts(method)
    (loss, grad), (expected, expected_grad) = with_it.loss_and_grad(method), without.loss_and_grad(method)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(grad[2:], expected_grad, **TOLERANCE)
    assert float(grad[:2].abs().max()) == 0.0


@pytest.mark.parametrize("name, other, settings", METHOD_CASES)
def test_a_batch_of_pairs_without_tokens_has_a_loss_of_zero_on_the_graph(name, other, settings):
    case = Case(other, [([1, 2], ([], []), ([], []))])
    leaf = case.student.clone().requires_grad_()
    for term in case.terms(make(name, **settings), leaf).terms:
        (grad,) = torch.autograd.grad(term.sum, leaf, retain_graph=True)
        assert float(term.sum.detach()) == 0.0
        assert float(grad.abs().max()) == 0.0


def dpo_by_hand(case, beta, smoothing=0.0, average=False):
    losses, rewards = [], []
    for pair in range(len(ROWS)):
        of_pair = []
        for row in (2 * pair, 2 * pair + 1):
            length = case.sequences[row].num_loss_tokens if average else 1
            of_pair.append(beta * (case.logp(case.student, row) - case.logp(case.reference, row)) / length)
        h = of_pair[0] - of_pair[1]
        losses.append(-(1 - smoothing) * torch.sigmoid(h).log() - smoothing * torch.sigmoid(-h).log())
        rewards.append(torch.stack(of_pair))
    return torch.stack(losses).mean(), torch.stack(rewards)


@pytest.mark.parametrize("smoothing, average", [(0.0, False), (0.2, False), (0.0, True)])
def test_dpo_is_the_mean_over_pairs_of_the_definition(smoothing, average):
    case, method = Case("rejected"), make("dpo", label_smoothing=smoothing, average_log_prob=average)
    loss, _ = case.loss_and_grad(method)
    expected, rewards = dpo_by_hand(case, 0.3, smoothing, average)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    metrics = {name: scalar(metric) for name, metric in case.terms(method).metrics.items()}
    assert set(metrics) == {
        "accuracy",
        "reward_margin",
        "chosen_rewards",
        "rejected_rewards",
        "chosen_logps",
        "rejected_logps",
    }
    assert metrics["accuracy"] == pytest.approx(float((rewards[:, 0] > rewards[:, 1]).double().mean()))
    assert metrics["reward_margin"] == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).mean()))
    assert metrics["chosen_rewards"] == pytest.approx(float(rewards[:, 0].mean()))
    assert metrics["rejected_rewards"] == pytest.approx(float(rewards[:, 1].mean()))


def test_dpo_without_a_reference_is_dpo_with_a_constant_one():
    case = Case("rejected")
    method = make("dpo", reference_free=True)
    assert method.needs.teachers == {}
    flat = Case("rejected")
    batch = flat.batch()
    batch.token_scores["reference_logprobs"] = torch.zeros(len(flat.layout.targets), dtype=torch.float64)
    expected = make("dpo").loss(flat.dense(flat.student), {}, batch).terms[0].sum
    torch.testing.assert_close(case.terms(method).terms[0].sum, expected, **TOLERANCE)


def test_dpos_sft_term_is_the_mean_over_the_chosen_tokens_of_their_cross_entropy():
    case = Case("rejected")
    loss, grad = case.loss_and_grad(make("dpo", sft_weight=0.5))
    plain, plain_grad = case.loss_and_grad(make("dpo"))
    torch.testing.assert_close(loss - plain, 0.5 * case.over_tokens("chosen", nll), **TOLERANCE)
    assert float((grad - plain_grad)[1::2].abs().max()) < 1e-15  # nothing of it reaches the rejected answers


def test_swapping_chosen_and_rejected_swaps_the_accuracy():
    swapped = [(prompt, other, chosen) for prompt, chosen, other in ROWS]
    case, turned = Case("rejected"), Case("rejected", swapped)
    for logits in ("student", "reference"):
        rows = getattr(case, logits).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        setattr(turned, logits, rows)
    before, after = case.terms(make("dpo")).metrics, turned.terms(make("dpo")).metrics
    assert scalar(after["accuracy"]) == pytest.approx(1 - scalar(before["accuracy"]))
    assert scalar(after["reward_margin"]) == pytest.approx(-scalar(before["reward_margin"]))
    assert scalar(after["chosen_logps"]) == pytest.approx(scalar(before["rejected_logps"]))


def test_dckd_is_the_sum_of_its_three_means():
    case = Case("rejected")
    loss, _ = case.loss_and_grad(make("dckd", distillation_weight=2.0))
    parts = {
        "loss_chosen_sft": case.over_tokens("chosen", nll),
        "loss_chosen_fkl": case.over_tokens("chosen", forward_kl),
        "loss_rejected_fkl": case.over_tokens("rejected", forward_kl),
    }
    expected = parts["loss_chosen_sft"] + 2 * (0.1 * parts["loss_chosen_fkl"] + 0.2 * parts["loss_rejected_fkl"])
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    metrics = case.terms(make("dckd")).metrics
    assert {name: scalar(metric) for name, metric in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in parts.items()}
    )


def test_dckd_on_chosen_answers_alone_is_gkd_with_the_forward_kl():
    case = Case("rejected")
    alone = make("dckd", sft_on_chosen=0.0, chosen_distil_weight=1.0, rejected_distil_weight=0.0)
    loss, grad = case.loss_and_grad(alone)
    gkd = METHODS["gkd"](METHODS["gkd"].Config(name="gkd", beta=0.0, lmbda=0.0, seq_kd=False, kd_temperature=1.0))
    chosen = case.batch().tokens_of("chosen")
    leaf = case.student.clone().requires_grad_()
    (term,) = gkd.loss(case.dense(leaf).at(chosen), {"teacher": case.dense(case.dpo).at(chosen)}, case.batch()).terms
    expected = term.sum / len(chosen)
    torch.testing.assert_close(loss, expected.detach(), **TOLERANCE)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0], **TOLERANCE)
    assert alone.needs.teachers["dpo_teacher"].kinds == ("chosen",)


def test_adpa_is_cross_entropy_on_chosen_minus_the_expected_advantage_on_responses():
    case = Case("response")
    loss, _ = case.loss_and_grad(make("adpa"))
    expected_advantage = case.over_tokens("response", advantage)
    expected = case.over_tokens("chosen", nll) - 1.6 * expected_advantage
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    on_response = case.over_tokens("response", lambda s, d, r, t: (d - r)[torch.arange(len(t)), t])
    metrics = {name: scalar(metric) for name, metric in case.terms(make("adpa")).metrics.items()}
    assert metrics == pytest.approx(
        {
            "loss_chosen_sft": float(case.over_tokens("chosen", nll)),
            "loss_adpa": -float(expected_advantage),
            "expected_advantage": float(expected_advantage),
            "advantage_on_response": float(on_response),
        }
    )


def test_every_term_of_adpa_counts_with_its_weight():
    case = Case("response")
    loss, _ = case.loss_and_grad(make("adpa", **EVERY_TERM))
    kept = [case.logp(case.reference, row) - case.logp(case.student, row) for row in (1, 3, 5)]
    expected = (
        case.over_tokens("chosen", nll)
        - 1.6 * case.over_tokens("response", advantage)
        + 0.5 * dpo_by_hand(case, 0.3)[0]
        + 2.0 * (0.1 * case.over_tokens("chosen", forward_kl) + 0.2 * case.over_tokens("response", forward_kl))
        + 0.7 * torch.stack(kept).mean()  # of whole responses, not of tokens
    )
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    metrics = case.terms(make("adpa", **EVERY_TERM)).metrics
    assert scalar(metrics["kl_penalty"]) == pytest.approx(float(torch.stack(kept).mean()))
    assert "accuracy" in metrics and "accuracy" not in case.terms(make("adpa")).metrics


def sft_on_chosen(case):
    leaf = case.student.clone().requires_grad_()
    chosen = case.batch().tokens_of("chosen")
    loss = F.cross_entropy(case.dense(leaf).hidden[chosen], case.layout.targets[chosen])
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("how", ["no weight", "equal teachers"])
def test_adpa_without_an_advantage_is_sft_on_the_chosen_answers(how):
    case = Case("response")
    if how == "equal teachers":
        case.ref = case.dpo
    method = make("adpa", adpa_weight=0.0 if how == "no weight" else 1.6)
    torch.testing.assert_close(case.loss_and_grad(method), sft_on_chosen(case), **TOLERANCE)


@pytest.mark.parametrize("name, other", [("dckd", "rejected"), ("adpa", "response")])
def test_a_tokens_gradient_is_multiplied_by_its_weight(name, other):
    case, method = Case(other), make(name)
    weights = torch.linspace(0.5, 2, len(case.layout.targets)).double()
    (_, weighted), (_, plain) = case.loss_and_grad(method, weights), case.loss_and_grad(method)
    owners = torch.zeros_like(plain[..., :1]).flatten(0, 1)
    owners[case.layout.predictors] = weights[:, None]
    torch.testing.assert_close(weighted, plain * owners.view(*plain.shape[:2], 1), **TOLERANCE)


def test_teachers_are_asked_only_by_the_terms_that_count_and_only_about_their_sequences():
    sparing = make("adpa").needs.teachers
    assert sparing == {
        "dpo_teacher": TeacherNeed("dense", "teacher", ("response",)),
        "ref_teacher": TeacherNeed("dense", "method.ref_teacher", ("response",)),
    }
    assert make("adpa", adpa_weight=0.0).needs.teachers == {}
    assert make("adpa", **EVERY_TERM).needs.teachers["dpo_teacher"].kinds == ("chosen", "response")
    assert make("adpa", **EVERY_TERM).needs.teachers["reference"] == TeacherNeed("logprobs", "initial")
    stored = make("adpa", scores="some/folder").needs.teachers
    assert {(need.scores, need.model) for need in stored.values()} == {("any", "method.scores")}
    assert make("dckd", dpo_teacher="some/folder").needs.teachers["dpo_teacher"].model == "method.dpo_teacher"
    assert make("dpo", precompute_reference=True).needs.teachers["reference"].precompute
    assert make("dpo", sanity_check=True).needs.rows == 100


def test_only_adpas_responses_may_be_sampled():
    fresh, stored = make("adpa", responses="student"), make("adpa")
    assert (fresh.origin(0.5, "response"), fresh.origin(0.5, "chosen")) == ("student", "dataset")
    assert stored.origin(0.5, "response") == "dataset"
    assert fresh.needs.rollouts and not stored.needs.rollouts


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("dpo", {"reference_free": True, "precompute_reference": True}, "method.precompute_reference=True"),
        ("dckd", {"chosen_distil_weight": 0.0, "rejected_distil_weight": 0.0}, "method.chosen_distil_weight=0"),
        ("dckd", {"released_quirks": True}, "method.top_k=None"),
        ("adpa", {"adpa_weight": 0.0, "sft_on_chosen": 0.0}, "method.adpa_weight=0"),
        ("adpa", {"adpa_weight": 0.0, "sft_on_chosen": 0.0, "distillation_weight": 1.0}, "method.adpa_weight=0"),
        ("adpa", {"ref_teacher": None}, "method.ref_teacher=None"),
        ("adpa", {"released_quirks": True}, "method.top_k=None"),
        ("adpa", {"scores": "some/folder", "responses": "student"}, "method.scores=some/folder"),
        ("adpa", {"scores": "some/folder", "released_quirks": True, "top_k": 50}, "method.scores=some/folder"),
        ("adpa", {"advantage_clip": [1.0, -1.0]}, r"method.advantage_clip=\[1.0, -1.0\]"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_in_one_line(name, settings, says):
    with pytest.raises(ConfigError, match=f"^{says}") as refusal:
        make(name, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.6}),
        ("dpo", {"sft_weight": -1.0}),
        ("dpo", {"loss_normalization": "token"}),
        ("dckd", {"loss_normalization": "pair"}),
        ("dckd", {"distillation_weight": 0.0}),
        ("adpa", {"top_k": 0}),
        ("adpa", {"responses": "teacher"}),
    ],
)
def test_values_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError):
        make(name, **settings)


def test_a_student_at_its_reference_starts_at_log_two():
    case = Case("rejected")
    case.reference = case.student
    loss, _ = case.loss_and_grad(make("dpo"))
    assert float(loss) == pytest.approx(math.log(2), abs=1e-12)
