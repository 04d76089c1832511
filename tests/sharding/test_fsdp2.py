"""A student in shards (FSDP2) trains as a whole one does: the same loss, gradient, rollouts, weights, checkpoints."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from contract.command import words_of, write_inputs
from contract.kills import assert_equal_to_the_bit, killed_and_whole
from contract.processes import on_two_ranks
from contract.test_resume import LORA
from contract.tiny import SHAPES, assert_same_numbers, distance, make_model
from contract.variants import ALL_VARIANTS, DEFAULTS, ROOT, VARIANTS, needs_of
from transformers import AutoModelForCausalLM

from sharding import fsdp2

SAMPLING = next(variant for variant in DEFAULTS if needs_of(variant).rollouts)
FROM_DATA = next(variant for variant in DEFAULTS if not needs_of(variant).rollouts)
SUBSTEPS = next(variant for variant in VARIANTS if needs_of(variant).num_substeps > 1)


def of_the_student(model):
    return next(v for v in VARIANTS if any(need.model == model for need in needs_of(v).teachers.values()))


AVERAGING, INITIAL = of_the_student("ema"), of_the_student("initial")
IN_SHORT = [SAMPLING, FROM_DATA, AVERAGING, INITIAL]  # the others are slow tests
FAMILIES = [kind for kind in SHAPES if kind != "llama"]

trained = functools.partial(functools.partial, fsdp2.trained)
# Compared with a single process.
EQUAL = {
    **{str(variant): trained(variant) for variant in IN_SHORT},
    "substeps": trained(SUBSTEPS, steps=2),
    **{kind: trained(SAMPLING, student={"kind": kind}) for kind in ("gpt2", "gemma2")},
    "adapter": trained(SAMPLING, student={"dropout": 0.0}),
    "checkpointing": trained(SAMPLING, student={"checkpointing": True}),
    "packing": trained(SAMPLING, train={"packing": True}),
}
MORE = {
    **{str(variant): trained(variant) for variant in ALL_VARIANTS if str(variant) not in EQUAL},
    **{f"{kind}-family": trained(SAMPLING, student={"kind": kind}) for kind in FAMILIES if kind not in EQUAL},
}
ALIKE = {  # compared with DDP on as many ranks
    "dropout": functools.partial(fsdp2.also_ddp, SAMPLING, student={"dropout": 0.1}, steps=2),
    "half_precision": functools.partial(fsdp2.also_ddp, FROM_DATA, hardware={"precision": "bf16"}),
    "adapter_in_half_precision": functools.partial(
        fsdp2.also_ddp, FROM_DATA, hardware={"precision": "bf16"}, student={"dropout": 0.0}
    ),
}
RESUMED = {
    "resumed": functools.partial(fsdp2.resumed, SAMPLING),
    "resumed_substeps": functools.partial(fsdp2.resumed, SUBSTEPS),
    "resumed_average": functools.partial(fsdp2.resumed, AVERAGING),
    "resumed_dropout": functools.partial(fsdp2.resumed, SAMPLING, dropout=0.1),
}
CHECKED = [str(variant) for variant in (SAMPLING, FROM_DATA, AVERAGING)]
OTHERS = {
    **{f"checked-{name}": functools.partial(fsdp2.checked, name) for name in CHECKED},
    "upside_down": functools.partial(fsdp2.checked_upside_down, str(SAMPLING)),
    "infinite": functools.partial(fsdp2.checked_infinite, str(FROM_DATA)),
    "loads_alone": functools.partial(fsdp2.loads_alone, SAMPLING),
    "gathered": functools.partial(fsdp2.gathered_alone, SAMPLING),
    "asked_average": functools.partial(fsdp2.asked_while_gathered, AVERAGING),
    "asked_initial": functools.partial(fsdp2.asked_while_gathered, INITIAL),
    "spoilt": functools.partial(fsdp2.spoilt, FROM_DATA),
    "evaluated": functools.partial(fsdp2.evaluated_unequally, FROM_DATA),
    "noted": fsdp2.noted_forwards,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks({**EQUAL, **ALIKE, **RESUMED, **OTHERS}, tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory):
    return on_two_ranks(MORE, tmp_path_factory.mktemp("more"))


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_in_shards_train_what_one_process_does(case, ranks, tmp_path):
    assert_trained_alike(ranks[case], EQUAL[case](1, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_every_variant_and_family_trains_in_shards_what_one_process_does(case, more_ranks, tmp_path):
    assert_trained_alike(more_ranks[case], MORE[case](1, tmp_path))


def assert_trained_alike(told, alone, relative=1e-6):
    assert [one + other for one, other in zip(*(rank["rollouts"] for rank in told), strict=True)] == alone["rollouts"]
    for rank in told:
        assert rank["in_shards"] == {True}
        assert rank["bytes"] <= 0.6 * alone["bytes"]  # a weight of an odd length is not cut in halves
        assert_same_numbers(rank["named"][0], alone["named"][0], relative)
        for mine, whole in zip(rank["gradients"], alone["gradients"], strict=True):
            assert distance(mine, whole) < relative
    assert sum(rank["bytes"] for rank in told) == alone["bytes"]
    assert distance(told[0]["weights"], alone["weights"]) < relative and not told[1]["weights"]


@pytest.mark.parametrize("case", ALIKE)
def test_shards_train_what_whole_copies_on_as_many_ranks_do(case, ranks):
    """Dropout to the bit; in half precision shards also round what autocast leaves whole: the norms' weights."""
    tolerance = 1e-6 if case == "dropout" else 3e-2
    for shards, whole in ranks[case]:
        assert shards["in_shards"] == {True} and whole["in_shards"] == {False}
        assert shards["rollouts"] == whole["rollouts"]
        assert shards["named"][0]["train/loss"] == pytest.approx(whole["named"][0]["train/loss"], rel=tolerance)
        assert distance(shards["gradients"][0], whole["gradients"][0]) < tolerance


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_shards_continues_to_the_bit(case, ranks):
    for whole, again in ranks[case]:
        assert again["named"] == whole["named"][3:]
        assert again["rollouts"] == whole["rollouts"][3:]
        assert again["weights"].keys() == whole["weights"].keys()
        assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())


def test_a_checkpoint_of_shards_is_a_model_that_loads_alone(ranks):
    for loaded in ranks["loads_alone"]:
        weights = ranks[str(SAMPLING)][0]["weights"]
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_gathered_weights_are_whole_and_forwards_wait_for_nobody(ranks):
    model = make_model("llama", 1)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(1, 9).view(2, 4)).logits
    first, second = ranks["gathered"]
    for logits in first["logits"]:
        torch.testing.assert_close(logits, expected)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert first["whole"] == second["whole"] == size
    assert first["before"] == first["after"] and first["before"] + second["before"] == size


@pytest.mark.parametrize("case", ["asked_average", "asked_initial"])
def test_a_student_that_teaches_itself_says_the_same_while_the_student_is_gathered(case, ranks):
    for said in ranks[case]:
        assert all(torch.equal(said[0], again) for again in said[1:])
    assert [len(said) for said in ranks[case]] == [4, 2]


def test_a_weight_that_is_not_finite_on_one_rank_is_refused_on_all(ranks):
    for said in ranks["spoilt"]:
        assert "embed_tokens" in said and "no longer finite" in said


@pytest.mark.parametrize("name", CHECKED)
def test_the_checks_have_nothing_to_say_of_a_healthy_student_in_shards(name, ranks):
    assert ranks[f"checked-{name}"] == [[], []]


def test_the_checks_tell_of_a_gradient_that_leads_away(ranks):
    for said in ranks["upside_down"]:
        assert any(line.startswith("gradient.descent") or "along its gradient" in line for line in said), said


def test_the_checks_tell_of_a_loss_that_is_not_finite_on_one_rank(ranks):
    for said in ranks["infinite"]:
        assert any("not finite" in line for line in said), said


def test_ranks_that_evaluated_unequally_many_rows_train_on_together(ranks, tmp_path):
    assert_trained_alike(ranks["evaluated"], fsdp2.evaluated_unequally(FROM_DATA, 1, tmp_path))


def test_nothing_is_kept_of_the_forwards_of_a_frozen_model(ranks):
    assert ranks["noted"] == [[0, 0, 0]] * 2


@pytest.mark.slow
def test_the_command_makes_the_model_that_ddp_makes(tmp_path):
    (tmp_path / "inputs").mkdir()
    inputs, models = write_inputs(tmp_path / "inputs"), []
    for sharding in ("ddp", "fsdp2"):
        words = words_of(SAMPLING, inputs, tmp_path / sharding, "train.max_steps=3", "hardware=cpu_2rank", LORA)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, "-m", "opd", *words, f"hardware.sharding={sharding}"]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / sharding / "final_model").state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_killed_command_continues_in_shards_to_the_bit(tmp_path):
    (tmp_path / "inputs").mkdir()
    inputs = write_inputs(tmp_path / "inputs")
    words = ("hardware=cpu_2rank", "hardware.sharding=fsdp2")
    _, whole, broken = killed_and_whole(AVERAGING, 2, inputs, tmp_path, *words)
    assert_equal_to_the_bit(whole, broken)
