"""Which of several ranks' ends is told, when each of them has one."""

from __future__ import annotations

import json
import signal

import pytest

from opd import interruption
from opd.errors import ConfigError, PreflightError, RunError
from opd.failures import GONE, Failure, Outcome, conclude, outcome, own_ends

LEFT_ALONE = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24931"


def failure(rank, seconds=0.0, exit_code=1, message="ValueError: a bug", trace="Traceback\n"):
    return Failure(rank, "n1", exit_code, message, trace, seconds, "logs")


def died(rank, number, seconds=9.0):
    return failure(rank, seconds, -number, "", "")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([failure(0, 2.0), failure(3, 1.0)], 3),
        ([failure(0, 1.0, message=LEFT_ALONE), failure(3, 2.0)], 3),  # clocks of two machines differ
        ([failure(0, 1.0, message=LEFT_ALONE), died(2, signal.SIGKILL)], 2),  # nothing else says why
        ([failure(1, 5.0), died(0, signal.SIGABRT, 4.0)], 1),  # torch aborts a rank whose peer is gone
        ([died(1, signal.SIGTERM, 1.0), failure(0, 1.0, GONE, "", ""), failure(2, 3.0)], 2),
    ],
)
def test_the_cause_is_told_and_not_what_follows_from_it(failures, told):
    half = len(failures) // 2
    outcomes = [Outcome(part, left_early=False, interrupted=False) for part in (failures[:half], failures[half:])]
    with pytest.raises(RunError, match=rf"^rank {told} on n1 "):
        conclude(outcomes)


@pytest.mark.parametrize("error", [ConfigError, PreflightError, RunError])
def test_what_a_rank_refuses_is_raised_again_word_by_word(error):
    with pytest.raises(error) as raised:
        conclude([Outcome([failure(0, 0.0, error.exit_code, "a=1: no\nb=2: no", "")], False, False)])
    assert type(raised.value) is error and str(raised.value) == "a=1: no\nb=2: no"


def test_an_interruption_is_not_taken_for_the_failure_that_it_causes(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    alone = Outcome([failure(1, message=LEFT_ALONE)], left_early=True, interrupted=True)
    with pytest.raises(SystemExit) as left:
        conclude([alone])
    assert left.value.code == interruption.INTERRUPTED
    with pytest.raises(RunError, match="a bug"):  # nor a failure for an interruption
        conclude([alone, Outcome([failure(0)], left_early=False, interrupted=True)])


def test_a_rank_that_the_kernel_killed_after_a_signal_is_a_failure_and_not_an_interruption():
    """It would be requeued for ever, with no checkpoint: memory is short again in the same step."""
    killed, left_alone = died(0, signal.SIGKILL), failure(1, message=LEFT_ALONE)
    for failures in ([killed], [killed, left_alone]):
        with pytest.raises(RunError, match=r"^rank 0 on n1 was ended by SIGKILL"):
            conclude([Outcome(failures, left_early=True, interrupted=True)])


def test_a_rank_that_torch_killed_for_outlasting_the_others_did_not_end_by_itself(tmp_path):
    kill, left = -signal.SIGKILL, interruption.INTERRUPTED
    assert outcome(tmp_path, own_ends({0: (left, 100), 1: (kill, 130)})).failures == []
    assert [each.rank for each in outcome(tmp_path, own_ends({0: (left, 100), 1: (kill, 101)})).failures] == [1]
    assert own_ends({}) == {}


def test_all_good_is_no_end_at_all_even_where_a_signal_came_too_late():
    conclude([Outcome([], left_early=False, interrupted=True)])


def test_what_a_rank_wrote_and_what_only_its_exit_code_says_are_put_together(tmp_path):
    (tmp_path / "3").mkdir()
    told = {"rank": 3, "host": "n2", "exit_code": 1, "message": "m", "trace": "t", "seconds": 1.5, "timestamp": 1}
    (tmp_path / "3" / "error.json").write_text(json.dumps(told))
    found = outcome(tmp_path, {2: -9, 3: 1, 4: 128 + signal.SIGTERM})
    assert [(each.rank, each.exit_code) for each in found.failures] == [(3, 1), (2, -9)]
    assert found.failures[0].output == str(tmp_path / "3")
    assert found.left_early and not found.is_good
    assert Outcome.loaded(found.dumped()) == found
