"""Killed three times at random steps and once in the middle of a save, a run still is the run that was never killed."""

from __future__ import annotations

import pytest

from contract.command import write_inputs
from contract.kills import assert_equal_to_the_bit, killed_and_whole
from contract.variants import DEFAULTS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# `python -m contract.kills` has every method with one rank and with two; it takes half an hour.
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "ranks"), [(DEFAULTS[0], 1), *((v, 2) for v in DEFAULTS[::3])], ids=str)
def test_four_kills_leave_no_trace(variant, ranks, inputs, tmp_path):
    kills, whole, broken = killed_and_whole(variant, ranks, inputs, tmp_path)
    assert any(kill.in_save for kill in kills)
    assert_equal_to_the_bit(whole, broken)
