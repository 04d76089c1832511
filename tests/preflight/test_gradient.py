"""The checks of the gradient: silent about what is healthy, and without a trace afterwards."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contract.command import FORKS
from contract.tiny import SHAPES, make_model
from contract.variants import DEFAULTS, NORMALIZATIONS, VARIANTS, Variant, needs_of
from preflight.tried import ADAPTER, find, heeded

from opd.models import causal_lm

GKD = next(variant for variant in DEFAULTS if variant.method == "gkd")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_healthy_variant_gives_neither_errors_nor_warnings(variant):
    assert heeded(find(variant)) == []


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normalization_of_the_loss_is_counted_right(normalization):
    assert heeded(find(Variant("gkd", normalization, (f"method.loss_normalization={normalization}",)))) == []


@pytest.mark.parametrize("variant", DEFAULTS, ids=str)
def test_a_healthy_adapter_in_half_precision_gives_neither_errors_nor_warnings(variant):
    assert heeded(find(variant, lora=ADAPTER, hardware={"precision": "bf16"})) == []


@pytest.mark.parametrize("kind", SHAPES)
def test_a_healthy_model_of_every_family_gives_neither_errors_nor_warnings(kind):
    assert heeded(find(GKD, kind=kind)) == []


@pytest.mark.parametrize("variant", [v for v in DEFAULTS if v.method in ("gkd", "opsd", "dpo")], ids=str)
def test_packed_rows_in_micro_batches_of_one_give_neither_errors_nor_warnings(variant):
    size = len(needs_of(variant).sequences)
    assert heeded(find(variant, train={"packing": True, "micro_batch_size": size})) == []


@pytest.mark.parametrize("rollout", [{"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 0.0}], ids=str)
def test_sharpened_and_greedy_rollouts_give_neither_errors_nor_warnings(rollout):
    assert heeded(find("reverse_kl-defaults", rollout=rollout)) == []


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["whole", "adapter"])
@pytest.mark.parametrize("variant", ["opsd-averaged_teacher", "minillm-paper", "sft-defaults"])
def test_models_and_random_states_are_left_as_they_were(variant, lora):
    kept = {}

    def take(student):
        kept["student"] = student
        kept["weights"] = {name: value.clone() for name, value in student.state_dict().items()}

    def look():
        student = kept["student"]
        kept["modes"] = [module.training for module in student.modules()]
        kept["attributes"] = [set(vars(module)) for module in student.modules()]
        kept["config"] = dict(vars(causal_lm(student).config))
        kept["random"] = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())

    find(variant, lora=lora, spoil=take, before=look)
    student = kept["student"]
    assert all(torch.equal(value, kept["weights"][name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert kept["modes"] == [module.training for module in student.modules()]
    assert kept["attributes"] == [set(vars(module)) for module in student.modules()]
    assert kept["config"] == dict(vars(causal_lm(student).config))
    assert torch.equal(kept["random"][0], torch.get_rng_state())
    assert kept["random"][1:] == (np.random.get_state()[1].tolist(), random.getstate())


def _rank(rank, folder, variants):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # accelerate asks; the ranks meet in a file
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    told = {str(variant): heeded(find(variant, hardware={"processes_per_node": 2})) for variant in variants}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_nothing_in_what_is_healthy(tmp_path):
    ranks = [FORKS.Process(target=_rank, args=(rank, tmp_path, DEFAULTS), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0, "a rank failed; its traceback stands above"
    for rank in range(2):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert told == {str(variant): [] for variant in DEFAULTS}


def test_a_teacher_that_is_a_copy_of_the_student_leaves_nothing_to_learn():
    findings = find(GKD, student=make_model("llama", seed=2), models={"teacher": make_model("llama", seed=2)})
    assert [finding.check for finding in findings if finding.severity == "error"] == ["gradient.descent"]


def test_a_method_that_reads_scores_at_their_own_labels_says_so():
    notes = [finding.line for finding in find("gold-observed") if finding.check == "gradient.alignment"]
    assert len(notes) == 1
    assert notes[0].startswith("note")
