"""A teacher that lies in shards, or in main memory, says and teaches what a whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from contract.command import logged, start, words_of, write_inputs
from contract.tiny import assert_same_numbers, distance, make_model
from contract.variants import ROOT
from placed import ALONE, FAMILIES, TAUGHT, alone, key_of, on_two_ranks, save_families

from opd.errors import ConfigError
from opd.models import freeze
from opd.offload import offload

SHARDED = ("fsdp2", "zero3")
PLACEMENTS = (*SHARDED, "cpu_offload")
SHORT_FAMILIES = ("llama", "qwen2")  # with a head of its own, and with one that is its embedding table
CASES = [(name, placement, None) for placement in SHARDED for name in ("ask_unevenly", "draw", "evaluate")]
CASES += [("score", placement, kind) for placement in PLACEMENTS for kind in SHORT_FAMILIES]
CASES += [("learn", placement, v) for placement in SHARDED for v in TAUGHT if v in ALONE.values()]
CASES += [("learn", "cpu_offload", ALONE["minillm"])]
CASES += [("lean_on_the_base", "local", None)]
SLOW_CASES = [("score", placement, kind) for placement in PLACEMENTS for kind in FAMILIES if kind not in SHORT_FAMILIES]
SLOW_CASES += [
    ("learn", placement, v) for placement in PLACEMENTS for v in TAUGHT if ("learn", placement, v) not in CASES
]
SLOW_CASES += [(name, "cpu_offload", None) for name in ("draw", "evaluate")]


def installed(cases):
    return [case for case in cases if case[1] != "zero3" or find_spec("deepspeed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("placed")
    save_families(made)
    return made


@pytest.fixture(scope="module")
def short(folder):
    return on_two_ranks(folder, installed(CASES))


@pytest.fixture(scope="module")
def long(folder):
    return on_two_ranks(folder, installed(SLOW_CASES))


@pytest.fixture(scope="module")
def told(request, folder):
    """What two ranks tell of a case, and what one process does; made once for all tests of it."""
    singly = {}

    def both(case):
        if case not in installed([case]):
            pytest.skip("deepspeed is not installed")
        where = "long" if case in SLOW_CASES else "short"
        if (name := (case[0], str(case[2]))) not in singly:
            singly[name] = alone(folder, case)
        return request.getfixturevalue(where)[key_of(case)], singly[name]

    return both


def named(name):
    """The cases of this name, as parameters."""
    return [
        pytest.param(case, id=f"{case[1]}-{case[2]}", marks=[pytest.mark.slow] if case in SLOW_CASES else [])
        for case in CASES + SLOW_CASES
        if case[0] == name
    ]


@pytest.mark.parametrize("case", named("score"))
def test_a_placed_teacher_says_what_a_whole_one_says(case, told):
    ranks, one = told(case)
    for rank in ranks:
        for name in ("logits", "scored", "logprobs", "top_k", "ids"):
            torch.testing.assert_close(rank[name], one[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [param for param in named("score") if param.values[0][1] in SHARDED])
def test_a_rank_holds_half_of_a_sharded_teacher_and_no_whole_head(case, told):
    ranks, one = told(case)
    whole = one["bytes"]
    assert all(rank["one_head"] and not rank["head_is_left"] for rank in ranks)
    assert sum(rank["bytes"] for rank in ranks) == whole
    assert all(rank["bytes"] <= 0.51 * whole for rank in ranks)


@pytest.mark.parametrize("case", named("ask_unevenly"))
def test_ranks_may_ask_sharded_teachers_unequally_often(case, told):
    (first, second), one = told(case)
    assert len(first["told"]) == 7 and len(second["told"]) == 2
    for rank in (first, second):
        expected = [one["again"][i % 2] for i in range(len(rank["told"]))]
        torch.testing.assert_close(rank["told"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(rank["again"], one["again"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", named("draw"))
def test_ranks_with_different_prompts_draw_the_tokens_of_a_whole_teacher(case, told):
    ranks, one = told(case)
    assert len({len(ids) for ids, _ in one.values()}) > 1  # some stop before others
    assert ranks[0] | ranks[1] == one


@pytest.mark.parametrize("case", named("evaluate"))
def test_evaluation_of_an_odd_number_of_rows_measures_what_one_process_does(case, told):
    ranks, one = told(case)
    assert {"gkd 5 1: forward_kl", "gkd 1 2: reverse_kl", "dckd 5 2: loss", "dckd 1 1: loss"} <= one.keys()
    for rank in ranks:
        assert_same_numbers(rank, one, 1e-6)


@pytest.mark.parametrize("case", named("learn"))
def test_a_method_learns_from_a_placed_teacher_what_it_learns_from_a_whole_one(case, told):
    ranks, one = told(case)
    assert ranks[0]["rollouts"] + ranks[1]["rollouts"] == one["rollouts"]
    for rank in ranks:
        assert_same_numbers(rank["named"], one["named"], 1e-6)
        assert distance(rank["gradient"], one["gradient"]) < 1e-6


@pytest.mark.parametrize("case", named("lean_on_the_base"))
def test_the_base_of_a_sharded_student_teaches_without_its_adapter(case, told):
    ranks, one = told(case)
    for rank in ranks:
        assert len(rank["told"]) == 2
        torch.testing.assert_close(rank["told"], one["told"], rtol=0, atol=1e-6)


def test_offloaded_layers_come_to_the_device_for_their_forward_and_go_home():
    """A visiting weight is a copy, on a CPU too; what lies in no layer stays where it is."""
    model = freeze(make_model("llama", 2))
    home = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    offload(model, "key", device=torch.device("cpu"))
    away = set()

    def look(*_):
        away.update(name for name, parameter in model.named_parameters() if parameter.data_ptr() != home[name])

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    model(input_ids=torch.tensor([[1, 2]]))
    assert away == {name for name in home if ".layers." in name}
    assert home == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_an_offloaded_layer_goes_home_when_its_forward_fails():
    model = freeze(make_model("llama", 2))
    home = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    offload(model, "key", device=torch.device("cpu"))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=torch.tensor([[1, 2]]))
    assert home == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_a_family_that_does_not_tell_its_layers_is_refused():
    model = make_model("llama", 2)
    model._no_split_modules = None
    with pytest.raises(ConfigError, match=r"teacher_placement=cpu_offload: .* set it to local$"):
        offload(model, "hardware.teacher_placement=cpu_offload", device=torch.device("cpu"))


COMMANDS = [  # what else is said; the engine's tests above have every method with every placement
    ("fsdp2", "gkd", ("method.seq_kd=true",)),
    ("zero3", "minillm", ()),
    ("zero3", "dckd", ("method.top_k=5",)),
    ("cpu_offload", "adpa", ()),
    ("fsdp2", "gold", ("method.skip_student_eos=false",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "method", "words"), COMMANDS)
def test_the_command_places_the_teacher_and_trains_what_one_process_does(placement, method, words, tmp_path):
    """The checks before training, three steps, and evaluations of five rows around them, on two ranks."""
    if placement == "zero3":
        pytest.importorskip("deepspeed")
    inputs, variant = write_inputs(tmp_path), ALONE[method]
    times = ("train.max_steps=3", "data.eval_prompts=5", "evaluation.batch_size=2", "train.eval_every_steps=2")
    times += ("evaluation.sampled=true", "evaluation.divergence=true", *words)
    one = start(words_of(variant, inputs, tmp_path / "one", *times), tmp_path / "one.log")
    two = words_of(variant, inputs, tmp_path / "two", *times, f"hardware.teacher_placement={placement}")
    two[two.index("hardware=cpu_tiny")] = "hardware=cpu_2rank"
    done = subprocess.run(
        [sys.executable, "-m", "opd", *two],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one.finish()
    lines = [logged(tmp_path / name) for name in ("one", "two")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, theirs in zip(*lines, strict=True):
        timeless = [{k: v for k, v in line.items() if "second" not in k} for line in (mine, theirs)]
        assert_same_numbers(*timeless, 1e-5 if mine["step"] > 1 else 1e-6)
