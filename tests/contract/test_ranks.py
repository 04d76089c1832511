"""Two ranks train what one does: the same loss, the same gradient, the same metrics."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from contract.command import logged, start, words_of, write_inputs
from contract.ranks import CASES, train_case, train_on_two_ranks
from contract.tiny import assert_same_numbers, distance, make_model
from contract.variants import DEFAULTS, ROOT, Variant, needs_of


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return train_on_two_ranks(tmp_path_factory.mktemp("ranks"), ["ragged", "one_rank_empty", "all_empty"])


@pytest.fixture(scope="module")
def two_ranks_with_options(tmp_path_factory):
    return train_on_two_ranks(tmp_path_factory.mktemp("optional"), ["optional"])


def pairs(*cases):
    return [pytest.param(case, variant, id=f"{variant}-{case}") for case in cases for variant in CASES[case][1]]


@pytest.mark.parametrize(("case", "variant"), pairs("ragged", "one_rank_empty"))
def test_two_ranks_give_the_loss_the_gradient_and_the_metrics_of_one(case, variant, two_ranks, tmp_path):
    assert_ranks_are_one(two_ranks[case, str(variant)], train_case(case, variant, 1, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "variant"), pairs("optional"))
def test_two_ranks_with_options_do_what_one_does(case, variant, two_ranks_with_options, tmp_path):
    assert_ranks_are_one(two_ranks_with_options[case, str(variant)], train_case(case, variant, 1, tmp_path))


def assert_ranks_are_one(ranks, alone):
    assert ranks[0]["rollouts"] + ranks[1]["rollouts"] == alone.rollouts
    for rank in ranks:
        assert_same_numbers(rank["named"], alone.named[0], 1e-6)
        assert distance(rank["gradient"], alone.gradients[0]) < 1e-6
    weights = [rank["weights"] for rank in ranks]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


@pytest.mark.parametrize(("case", "variant"), pairs("all_empty"))
def test_a_step_without_a_loss_token_is_skipped_on_both_ranks(case, variant, two_ranks):
    untouched = make_model("llama", 1).state_dict()
    for rank in two_ranks[case, str(variant)]:
        assert rank["named"]["train/loss"] == 0
        assert all(torch.equal(rank["weights"][name], value) for name, value in untouched.items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", [next(v for v in DEFAULTS if needs_of(v).rollouts)], ids=str)
def test_the_command_on_two_ranks_trains_what_one_process_does(variant: Variant, tmp_path):
    """The real command starts its own ranks; three steps with rollouts, and the evaluation around them."""
    inputs = write_inputs(tmp_path)
    times = ("train.max_steps=3", "train.save_every_steps=2", "evaluation.sampled=true", "evaluation.divergence=true")
    alone = start(words_of(variant, inputs, tmp_path / "one", *times), tmp_path / "one.log")
    words = words_of(variant, inputs, tmp_path / "two", *times)
    words[words.index("hardware=cpu_tiny")] = "hardware=cpu_2rank"
    done = subprocess.run(
        [sys.executable, "-m", "opd", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone.finish()
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        timeless = [{k: v for k, v in line.items() if "second" not in k} for line in (mine, theirs)]
        assert_same_numbers(*timeless, 1e-5 if mine["step"] > 1 else 1e-6)
