"""Packed rows: several views share one, and nothing that is computed for a view changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.data.collate import lay_out
from opd.errors import ConfigError
from opd.models import attach_objective, check_packing, predicting_states
from opd.protocols import TokenView
from tests.contract.tiny import PAD, SHAPES, make_model

LENGTHS = [9, 2, 1, 7, 7, 3, 12, 5, 4]


def views_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, 60, (length,), generator=draw).tolist()
        made.append(TokenView(ids, (torch.rand(length, generator=draw) < 0.7).tolist()))
    return made


@given(st.lists(st.integers(1, 20), max_size=12), st.booleans())
def test_every_token_of_every_view_stands_once_in_a_packed_layout(lengths, at_labels):
    views = views_of(lengths)
    padded = lay_out(views, pad_id=PAD, at_labels=at_labels)
    packed = lay_out(views, pad_id=PAD, at_labels=at_labels, packed=True)
    assert packed.targets.tolist() == padded.targets.tolist()
    assert packed.owner.tolist() == padded.owner.tolist()
    assert packed.input_ids.shape[1] == max(lengths, default=1)
    assert packed.input_ids.shape[0] <= len(views)
    rows = [
        list(zip(ids, positions, strict=True))
        for ids, positions in zip(packed.input_ids.tolist(), packed.position_ids.tolist(), strict=True)
    ]
    runs = []
    for row in rows:
        for token, position in row:
            if position == 0:
                runs.append([])
            runs[-1].append(token)
    for view in views:
        runs.remove(view.ids)
    assert all(run == [PAD] for run in runs)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_the_token_before_a_label_is_its_predictor(lengths):
    views = views_of(lengths)
    for packed in (False, True):
        layout = lay_out(views, pad_id=PAD, packed=packed)
        flat = layout.input_ids.flatten()
        expected = [
            (view.ids[t - 1], view.ids[t]) for view in views for t in range(1, len(view.ids)) if view.loss_mask[t]
        ]
        assert list(zip(flat[layout.predictors].tolist(), layout.targets.tolist(), strict=True)) == expected


def test_packing_saves_the_padding():
    views = [TokenView([1] * n, [True] * n) for n in (8, 4, 4, 2, 2, 2, 2)]
    assert lay_out(views, pad_id=PAD, packed=True).input_ids.shape == (3, 8)


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "opt"])
def test_a_packed_view_is_read_as_if_it_were_alone(kind):
    model = make_model(kind, seed=3).double().eval()
    views = views_of(LENGTHS)
    with torch.no_grad():
        packed = predicting_states(model, lay_out(views, pad_id=PAD, packed=True))
        alone = torch.cat([predicting_states(model, lay_out([view], pad_id=PAD)) for view in views])
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


def test_a_model_that_looks_across_is_refused():
    check_packing(make_model("llama", seed=3), "model.student.path")
    with pytest.raises(ConfigError, match=r"train\.packing=True: OPTForCausalLM"):
        check_packing(make_model("opt", seed=3), "model.student.path")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_packed_and_padded_rows_have_one_gradient(kind):
    gradients = []
    for packed in (False, True):
        model = make_model(kind, seed=3).double()
        attach_objective(model)
        layout = lay_out(views_of(LENGTHS), pad_id=PAD, packed=packed)
        model(layout=layout, objective=lambda hidden: hidden.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)
