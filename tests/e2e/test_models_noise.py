"""What installed libraries have to say about machines and kernels that a run does not ask for is not the run's to tell."""

from __future__ import annotations

import pytest

from e2e.command import shell
from e2e.model_folders import file_run
from e2e.pair_rows import LORA


@pytest.mark.slow
def test_a_command_prints_nothing_of_libraries_that_it_does_not_use(tmp_path, rows, student, teacher):
    answer = shell(*file_run(tmp_path / "run", rows, student, teacher, "mode=check"))
    assert answer.code == 0, answer.stderr
    assert "nothing stands against this training" in answer.stdout
    assert_quiet(answer)


@pytest.mark.slow
def test_a_training_with_adapters_and_gradient_checkpointing_prints_nothing_of_theirs(tmp_path, rows, student, teacher):
    pytest.importorskip("bitsandbytes")
    more = (LORA, "model.student.gradient_checkpointing=true", "model.student.quantization=8bit", "run.preflight=off")
    answer = shell(*file_run(tmp_path / "run", rows, student, teacher, *more))
    assert answer.code == 0, answer.stderr
    assert_quiet(answer)


def assert_quiet(answer):
    for line in (answer.stdout + answer.stderr).splitlines():
        for noise in ("accelerator", "gemm_4bit", "MatMul8bitLt", "deprecated", "fan_in_fan_out", "warn("):
            assert noise not in line
