"""One model and two prompts. The model here is causal and small: any function of the tokens so far would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.data.collate import lay_out
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.protocols import Batch, Dense, Head, TeacherNeed, TokenSequence, TokenView

VOCAB, HIDDEN = 9, 5
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
DEFAULTS = yaml.safe_load((Path(__file__).parents[2] / "conf/method/opsd.yaml").read_text())["method"]


def make_method(**settings):
    return METHODS["opsd"](METHODS["opsd"].Config(**{**DEFAULTS, **settings}))


def make_gkd(beta, temperature):
    gkd = METHODS["gkd"]
    return gkd(gkd.Config(name="gkd", beta=beta, lmbda=1.0, seq_kd=False, kd_temperature=temperature))


class Model:
    """The mean of the embeddings so far, and the last one, through a tanh; what padding is follows nobody."""

    def __init__(self, seed, *, remembers=True):
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
        self.head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
        self.remembers = remembers

    def read(self, layout):
        """Scores of the loss tokens."""
        embedded = self.embedding[layout.input_ids]
        steps = torch.arange(1, embedded.shape[1] + 1, dtype=torch.float64)[:, None]
        hidden = torch.tanh(embedded + self.remembers * embedded.cumsum(1) / steps)
        return Dense(hidden.flatten(0, 1)[layout.predictors], Head(self.head))


@st.composite
def conversations(draw):
    """Sequences, of which the teacher reads a few tokens more in front of the completion."""
    ids = st.integers(0, VOCAB - 1)
    sequences = []
    for row in range(draw(st.integers(1, 4))):
        prompt, privileged = (draw(st.lists(ids, min_size=size, max_size=6)) for size in (1, 0))
        completion = draw(st.lists(ids, min_size=1, max_size=6))
        sequence = TokenSequence(row, prompt, completion, [True] * len(completion), origin="student")
        seen = prompt + privileged
        sequence.views["teacher"] = TokenView(seen + completion, [False] * len(seen) + [True] * len(completion))
        sequences.append(sequence)
    return sequences


def without_privileged(sequences):
    return [
        TokenSequence(each.row, each.prompt_ids, each.completion_ids, each.completion_mask, origin=each.origin)
        for each in sequences
    ]


def make_batch(sequences, extra_columns=(0, 0)):
    """The batch; `extra_columns` of padding are added to the student's and to the teacher's layout."""
    layouts = []
    views = [
        [each.student_view for each in sequences],
        [each.views.get("teacher", each.student_view) for each in sequences],
    ]
    for side, extra in zip(views, extra_columns, strict=True):
        # An unscored row makes the others wider, as a longer neighbour in a micro-batch does.
        width = max(len(view.ids) for view in side) + extra
        layouts.append(lay_out([*side, TokenView([1] * width, [False] * width)], pad_id=0))
    student, teacher = layouts
    torch.testing.assert_close(teacher.targets, student.targets)
    return Batch(sequences, student, views={"teacher": teacher})


def loss_and_grad(method, student, teacher, batch):
    scores = teacher.read(batch.views["teacher"])
    terms = method.loss(student.read(batch.layout), {"teacher": scores}, batch)
    (term,) = terms.terms
    assert (term.count, term.weight) == ("tokens", 1.0)
    return term.sum.detach(), torch.autograd.grad(term.sum, student.head)[0]


betas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
variants = st.sampled_from(
    [{}, {"token_clip": 0.05}, {"top_k": 3}, {"token_clip": 0.2, "top_k": 4}, {"loss": "sampled_token"}]
)
temperatures = st.sampled_from([0.7, 1.0, 1.1])


@settings(deadline=None, max_examples=40)
@given(conversations(), betas, temperatures, variants)
def test_a_teacher_that_is_the_student_and_sees_no_more_teaches_nothing(sequences, beta, temperature, variant):
    model = Model(0)
    method = make_method(beta=beta, kd_temperature=temperature, **variant)
    loss, grad = loss_and_grad(method, model, model, make_batch(without_privileged(sequences)))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(conversations(), betas, temperatures)
def test_another_model_that_sees_no_more_is_gkd(sequences, beta, temperature):
    student, teacher = Model(0), Model(1)
    batch = make_batch(without_privileged(sequences))
    ours = loss_and_grad(make_method(beta=beta, kd_temperature=temperature), student, teacher, batch)
    torch.testing.assert_close(ours, loss_and_grad(make_gkd(beta, temperature), student, teacher, batch), **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(conversations(), betas, variants)
def test_tokens_meet_by_their_number_in_the_completion_whatever_stands_before_it(sequences, beta, variant):
    """A teacher that forgets all but the last token is blind to longer prompts, if the first token is left out."""
    for sequence in sequences:
        sequence.completion_mask[0] = False
        seen = len(sequence.views["teacher"].ids) - len(sequence.completion_ids)
        sequence.views["teacher"].loss_mask[seen] = False
    student, teacher = Model(0), Model(1, remembers=False)
    method = make_method(beta=beta, **variant)
    longer = loss_and_grad(method, student, teacher, make_batch(sequences))
    plain = loss_and_grad(method, student, teacher, make_batch(without_privileged(sequences)))
    torch.testing.assert_close(longer, plain, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(conversations(), betas, variants, st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_padding_of_either_side_changes_nothing(sequences, beta, variant, extra_columns):
    student, teacher = Model(0), Model(1)
    method = make_method(beta=beta, **variant)
    tight = loss_and_grad(method, student, teacher, make_batch(sequences))
    wide = loss_and_grad(method, student, teacher, make_batch(sequences, extra_columns))
    torch.testing.assert_close(wide, tight, **TOLERANCE)


@settings(deadline=None, max_examples=40)
@given(conversations(), betas, variants)
def test_sequences_scored_one_by_one_add_up(sequences, beta, variant):
    student, teacher = Model(0), Model(1)
    method = make_method(beta=beta, **variant)
    parts = [loss_and_grad(method, student, teacher, make_batch([sequence])) for sequence in sequences]
    summed = tuple(torch.stack(column).sum(0) for column in zip(*parts, strict=True))
    torch.testing.assert_close(loss_and_grad(method, student, teacher, make_batch(sequences)), summed, **TOLERANCE)


def some_sequence():
    sequence = TokenSequence(0, [1, 2], [3, 4, 5], [True] * 3, origin="student")
    sequence.views["teacher"] = TokenView([1, 2, 7, 8, 3, 4, 5], [False] * 4 + [True] * 3)
    return sequence


@pytest.mark.parametrize("variant", [{}, {"token_clip": 0.05}, {"top_k": 3}, {"loss": "sampled_token"}], ids=str)
def test_no_gradient_reaches_the_model_through_the_teachers_prompt(variant):
    """The teacher is the model that learns, so only this keeps it from learning to be agreed with."""
    model, batch = Model(0), make_batch([some_sequence()])
    fixed = Model(0)
    fixed.head.requires_grad_(False)
    method = make_method(**variant)
    shared = loss_and_grad(method, model, model, batch)
    assert shared[1].abs().max() > 1e-6
    torch.testing.assert_close(shared, loss_and_grad(method, model, fixed, batch), **TOLERANCE)


@pytest.mark.parametrize("variant", [{}, {"token_clip": 0.05}, {"top_k": 3}, {"loss": "sampled_token"}], ids=str)
def test_a_tokens_gradient_is_multiplied_by_its_weight(variant):
    student, teacher, batch = Model(0), Model(1), make_batch([some_sequence()])
    method = make_method(**variant)
    scores = teacher.read(batch.views["teacher"])
    leaf = student.read(batch.layout).hidden.requires_grad_()

    def grad(weights):
        batch.weights = weights
        (term,) = method.loss(Dense(leaf, Head(student.head.detach())), {"teacher": scores}, batch).terms
        return torch.autograd.grad(term.sum, leaf)[0]

    weights = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(grad(weights), weights[:, None] * grad(None), **TOLERANCE)


@pytest.mark.parametrize("variant", [{}, {"token_clip": 0.05}, {"top_k": 3}, {"loss": "sampled_token"}], ids=str)
def test_a_micro_batch_without_loss_tokens_has_a_zero_loss_and_the_same_metrics(variant):
    model = Model(0)
    method = make_method(**variant)
    some, none = make_batch([some_sequence()]), make_batch([TokenSequence(0, [1, 2], [], [])])
    counted, empty = (
        method.loss(model.read(batch.layout), {"teacher": model.read(batch.views["teacher"])}, batch)
        for batch in (some, none)
    )
    (grad,) = torch.autograd.grad(empty.terms[0].sum, model.head)
    assert float(empty.terms[0].sum.detach()) == 0.0
    assert (grad == 0).all()
    assert list(empty.metrics) == list(counted.metrics)


def test_the_metrics_are_both_kls_the_entropy_the_agreement_and_what_is_clipped():
    batch = make_batch([some_sequence()])
    student, teacher = Model(0).read(batch.layout), Model(1).read(batch.views["teacher"])
    metrics = make_method(token_clip=0.05, beta=0.0).loss(student, {"teacher": teacher}, batch).metrics
    s, t = ((scores.hidden @ scores.head.weight.T).softmax(1).detach() for scores in (student, teacher))
    expected = {
        "forward_kl": (t * (t / s).log()).sum(),
        "reverse_kl": (s * (s / t).log()).sum(),
        "entropy": -(s * s.log()).sum(),
        "clip_fraction": (t * (t / s).log() > 0.05).any(1).double().sum(),
        "teacher_student_agreement": (s.argmax(1) == t.argmax(1)).double().sum(),
    }
    assert metrics.keys() == expected.keys()
    for name, (numerator, denominator) in metrics.items():
        assert denominator == 3
        torch.testing.assert_close(numerator, expected[name], **TOLERANCE)


@pytest.mark.parametrize("mode", ["current", "initial", "ema"])
def test_the_teacher_is_the_model_itself_in_the_asked_for_state(mode):
    needs = make_method(teacher_mode=mode, ema_decay=0.9).needs
    assert needs.teachers == {"teacher": TeacherNeed("dense", mode, ema_decay=0.9)}


@pytest.mark.parametrize(
    ("lmbda", "completions", "rollouts"), [(1.0, "unused", True), (0.5, "required", True), (0.0, "required", False)]
)
def test_completions_of_the_data_are_asked_for_where_the_student_does_not_sample(lmbda, completions, rollouts):
    method = make_method(lmbda=lmbda)
    assert (method.needs.completions, method.needs.rollouts) == (completions, rollouts)
    origins = {method.origin(coin / 10, "single") for coin in range(10)}
    assert origins == {1.0: {"student"}, 0.5: {"student", "dataset"}, 0.0: {"dataset"}}[lmbda]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"privileged_template": "{privileged}"}, "method.privileged_template='{privileged}': does not hold {user}; "),
        ({"layout": "concat", "teacher_prompt": "full"}, "method.layout=concat: "),
        ({"loss": "sampled_token", "lmbda": 0.5}, "method.lmbda=0.5: "),
        ({"loss": "sampled_token", "token_clip": 0.1}, "method.token_clip=0.1: "),
        ({"loss": "sampled_token", "top_k": 4}, "method.top_k=4: "),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(settings, key):
    with pytest.raises(ConfigError) as caught:
        make_method(**settings)
    message = str(caught.value)
    assert message.startswith(key)
    assert "; " in message and "\n" not in message
