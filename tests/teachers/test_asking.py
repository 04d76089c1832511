"""Which sequences a teacher is asked about, and what stands where it was not."""

from __future__ import annotations

import pytest
import torch
from contract.tiny import PAD, STUDENT_VOCAB, TEACHER_VOCAB, make_model

from opd.data.collate import lay_out
from opd.models import freeze
from opd.objectives import final_logits
from opd.protocols import Batch, Needs, TeacherNeed, TokenSequence
from opd.teachers import LocalTeacher, ask_teachers

PAIRS = [
    ("chosen", [5, 6], [7, 8, 9]),
    ("rejected", [5, 6], [10, 11, 12, 13, 14, 15, 16, 17]),  # the widest; without it the rest is padded less
    ("chosen", [20, 21, 22], [23]),
    ("rejected", [20, 21, 22], [24, 25]),
]


def make_batch(sequences=PAIRS, *, packed=False):
    made = [
        TokenSequence(row // 2, prompt, completion, [True] * len(completion), kind=kind)
        for row, (kind, prompt, completion) in enumerate(sequences)
    ]
    return Batch(made, lay_out([one.student_view for one in made], pad_id=PAD, packed=packed))


@pytest.fixture(scope="module")
def model():
    return freeze(make_model("llama", seed=2, vocab_size=TEACHER_VOCAB))


def ask(model, batch, *, scores, kinds, top_k=None):
    teacher = LocalTeacher(model, vocab_size=STUDENT_VOCAB, top_k=top_k)
    given = ask_teachers(Needs({"wise": TeacherNeed(scores, kinds=kinds)}), {"wise": teacher}, batch)
    return given.get("wise"), batch.token_scores.get("wise_logprobs")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kinds", [("chosen",), ("rejected",), ("rejected", "chosen")])
def test_log_probabilities_of_asked_kinds_are_those_of_asking_about_all_and_of_others_nan(model, kinds, packed):
    batch = make_batch()
    _, everything = ask(model, batch, scores="logprobs", kinds=None)
    part = make_batch(packed=packed)
    _, some = ask(model, part, scores="logprobs", kinds=kinds)
    asked = torch.cat([batch.tokens_of(kind) for kind in kinds]).sort().values
    torch.testing.assert_close(some[asked], everything[asked])
    others = torch.ones(len(some), dtype=torch.bool)
    others[asked] = False
    assert some[others].isnan().all()
    assert not everything.isnan().any()


@pytest.mark.parametrize("top_k", [None, 7])
def test_distributions_of_asked_kinds_are_those_of_asking_about_all_and_of_others_nan(model, top_k):
    batch = make_batch()
    scores, _ = ask(model, batch, scores="any", kinds=("rejected",), top_k=top_k)
    whole, _ = ask(model, make_batch(), scores="any", kinds=None, top_k=top_k)
    asked, others = batch.tokens_of("rejected"), batch.tokens_of("chosen")
    if top_k is None:
        torch.testing.assert_close(
            final_logits(scores.at(asked), slice(None)), final_logits(whole.at(asked), slice(None))
        )
        assert scores.hidden[others].isnan().all()
    else:
        assert torch.equal(scores.ids[asked], whole.ids[asked])
        torch.testing.assert_close(scores.logprobs[asked], whole.logprobs[asked])
        torch.testing.assert_close(scores.tail[asked], whole.tail[asked])
        assert scores.logprobs[others].isnan().all() and scores.tail[others].isnan().all()
        assert scores.ids[others].max() < STUDENT_VOCAB  # they can still be gathered


@pytest.mark.parametrize("first", [0, 1])
def test_a_sequence_without_a_loss_token_does_not_shift_its_neighbours(model, first):
    """Of the asked kind (0) or of the other one (1), at the batch's end and at its beginning."""
    for empty in (first, first + 2):
        sequences = [(kind, prompt, [] if k == empty else ids) for k, (kind, prompt, ids) in enumerate(PAIRS)]
        batch = make_batch(sequences)
        _, everything = ask(model, make_batch(sequences), scores="logprobs", kinds=None)
        _, some = ask(model, batch, scores="logprobs", kinds=("chosen",))
        asked = batch.tokens_of("chosen")
        torch.testing.assert_close(some[asked], everything[asked])
        assert some.isnan().sum() == len(some) - len(asked)


def test_where_no_sequence_of_the_kind_has_a_loss_token_everything_is_nan(model):
    batch = make_batch([(kind, prompt, [] if kind == "chosen" else ids) for kind, prompt, ids in PAIRS])
    _, some = ask(model, batch, scores="logprobs", kinds=("chosen",))
    assert len(some) == 10
    assert some.isnan().all()


def test_a_teacher_scores_in_its_own_precision_whatever_the_student_computes_in(model):
    _, plain = ask(model, make_batch(), scores="logprobs", kinds=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, _ = ask(model, make_batch(), scores="dense", kinds=None)
    layout = make_batch().layout
    logprobs = final_logits(dense, slice(None)).log_softmax(1).gather(1, layout.targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, plain)


def test_numbers_that_a_window_has_brought_are_not_asked_for_again(model):
    batch = make_batch()
    known = torch.arange(float(len(batch.layout.targets)))
    batch.token_scores["wise_logprobs"] = known
    _, given = ask(model, batch, scores="logprobs", kinds=None)
    assert given is known
