"""Scores that were kept: they are the live teacher's, found by what was scored, and refused for anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from contract.tiny import PAD, STUDENT_VOCAB, TEACHER_VOCAB, make_examples, make_model

from opd.data.collate import lay_out
from opd.errors import ConfigError, RunError
from opd.models import freeze
from opd.protocols import Sparse, TokenSequence
from opd.teachers import CachedTeacher, LocalTeacher, write_scores

CPU = torch.device("cpu")
TOP_K = 6


def sequences():
    """Ragged ones with holes in their masks, one without a loss token, and one twice."""
    made = [
        TokenSequence(
            row.row, row.prompt_ids, row.completion_ids, row.completion_mask or [True] * len(row.completion_ids)
        )
        for row in make_examples(6)
    ]
    empty = replace(made[1], completion_mask=[False] * len(made[1].completion_ids))
    return [*made, empty, made[2]]


def layout(some):
    return lay_out([one.student_view for one in some], pad_id=PAD)


@pytest.fixture(scope="module")
def live():
    model = freeze(make_model("llama", seed=2, vocab_size=TEACHER_VOCAB))
    return LocalTeacher(model, vocab_size=STUDENT_VOCAB, top_k=TOP_K)


def entries(values, some):
    lengths = [one.num_loss_tokens for one in some]
    if isinstance(values, Sparse):
        columns = (column.split(lengths) for column in (values.ids, values.logprobs, values.tail))
        return [Sparse(*entry) for entry in zip(*columns, strict=True)]
    return list(values.split(lengths))


def keep(folder, live, kind="sparse"):
    folder.mkdir(exist_ok=True)
    some = sequences()
    values = live.score(layout(some), some) if kind == "sparse" else live.logprobs(layout(some), some)
    write_scores(folder, some, {"wise": entries(values, some)}, {"top_k": TOP_K if kind == "sparse" else 0})
    return CachedTeacher(folder, "wise", device=CPU, key="method.scores")


@pytest.fixture
def kept(tmp_path, live):
    return keep(tmp_path, live)


# All of them, some in another order, one alone and twice, and the one without a loss token among others.
CHOICES = ([0, 1, 2, 3, 4, 5, 6, 7], [5, 3, 0], [4], [2, 2], [6, 1], [1, 6])


@pytest.mark.parametrize("choice", CHOICES)
def test_kept_distributions_are_those_of_the_live_teacher(kept, live, choice):
    some = [sequences()[i] for i in choice]
    told, wanted = kept.score(layout(some), some), live.score(layout(some), some)
    assert torch.equal(told.ids, wanted.ids)
    torch.testing.assert_close(told.logprobs, wanted.logprobs)
    torch.testing.assert_close(told.tail, wanted.tail)
    assert kept.top_k == TOP_K


@pytest.mark.parametrize("choice", CHOICES)
def test_kept_log_probabilities_are_those_of_the_live_teacher(tmp_path, live, choice):
    kept, some = keep(tmp_path, live, "logprobs"), [sequences()[i] for i in choice]
    torch.testing.assert_close(kept.logprobs(layout(some), some), live.logprobs(layout(some), some))


def test_keeping_twice_writes_the_same_bytes(tmp_path, live):
    for name in ("first", "second"):
        keep(tmp_path / name, live)
    for name in ("scores.safetensors", "scores.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_row_and_the_kind_of_a_sequence_do_not_matter_its_tokens_do(kept):
    known = sequences()[0]
    kept.check([replace(known, row=99, kind="chosen", origin="student")])
    others = {
        "prompt": replace(known, prompt_ids=[*known.prompt_ids[:-1], 59]),
        "completion": replace(known, completion_ids=[*known.completion_ids[:-1], 58]),
        "cut": replace(known, completion_ids=known.completion_ids[:-1], completion_mask=known.completion_mask[:-1]),
        "mask": replace(known, completion_mask=[not known.completion_mask[0], *known.completion_mask[1:]]),
        "border": replace(
            known,
            prompt_ids=known.prompt_ids + known.completion_ids[:1],
            completion_ids=known.completion_ids[1:],
            completion_mask=known.completion_mask[1:],
        ),
    }
    for other in others.values():
        with pytest.raises(ConfigError, match=r"method\.scores=.* has no scores of the single completion of row 0 as"):
            kept.check([known, other])
        with pytest.raises(ConfigError):
            kept.score(layout([other]), [other])


def test_log_probabilities_at_another_temperature_are_not_made_up(tmp_path, live):
    kept, some = keep(tmp_path, live, "logprobs"), sequences()
    with pytest.raises(RunError, match="temperature 1, not 2"):
        kept.logprobs(layout(some), some, temperature=2.0)


@pytest.mark.parametrize("damage", ["no folder", "no tensors", "half the tensors", "no JSON", "another teacher"])
def test_a_folder_that_holds_no_such_scores_is_refused_in_one_line(tmp_path, live, damage):
    folder = tmp_path / "scores"
    keep(folder, live)
    tensors, facts = folder / "scores.safetensors", folder / "scores.json"
    if damage == "no tensors":
        tensors.unlink()
    elif damage == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    elif damage == "no JSON":
        facts.write_text(facts.read_text()[:-5])
    elif damage == "another teacher":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "teachers": ["dull"]}))
    else:
        folder = tmp_path / "nowhere"
    with pytest.raises(ConfigError) as caught:
        CachedTeacher(folder, "wise", device=CPU, key="method.scores")
    message = str(caught.value)
    assert message.startswith(f"method.scores={folder}: ") and "mode=scores" in message and "\n" not in message
