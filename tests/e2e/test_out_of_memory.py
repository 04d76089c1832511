"""A run that really runs out of memory: the process may take no more addresses than it needs to begin."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from e2e.command import ENVIRONMENT, call
from e2e.model_folders import build_tokenizer, file_run

LIMITED = """
import resource, sys
import torch, transformers, opd.rank
from opd.__main__ import main
room = int(sys.argv.pop(1)) * 2**20
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
main()
"""
FIRST = "  1. train.micro_batch_size=1 (now 64): sequences in one forward and backward"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A student of 61 MB: its gradient and its optimizer's state take three times as much again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("large") / "model"
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = LlamaConfig(
        vocab_size=60_000,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def limited(room, words):
    """The command in a process that may take `room` MB beyond its imports."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *words],
        env={**ENVIRONMENT, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process by what Linux says of it")
@pytest.mark.parametrize(
    ("room", "begun"),
    [pytest.param(80, False, id="loading", marks=pytest.mark.slow), pytest.param(350, True, id="training")],
)
def test_out_of_memory_ends_with_what_to_change_and_leaves_a_run_that_continues(tmp_path, rows, large, room, begun):
    words = file_run(tmp_path / "run", rows, large, None, "method=sft", "run.preflight=off")
    ended = limited(room, words)
    told = [line.removeprefix("opd: ") for line in ended.stderr.splitlines() if line.startswith("opd: ")]
    assert ended.returncode == 1, ended.stderr
    assert re.search("allocate memory", told[0])
    assert told[1].startswith("out of memory; in this order") and told[2] == FIRST
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "run" / "metrics.jsonl").is_file() == begun
    if begun:
        again = call(*words)
        assert again.code == 0, again.stderr
        assert (tmp_path / "run" / "final_model").is_dir()
