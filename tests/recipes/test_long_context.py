"""experiment=opsd_32k at its real length: one step on 32,768 tokens, and what the loss takes does not grow with them.

A model of the recipe's architecture with a hidden size of 32 and 4,096 entries, so that whole logits would be by far the
largest thing: 512 MB a context in fp32, before any softmax.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.command import ENVIRONMENT
from e2e.model_folders import build_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LENGTH, COMPLETION = 32_768, 1_024


def megabytes(*words: str) -> float:
    """What memory.py says of these words, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "memory.py"), *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Qwen2, as the recipe's, for 36,864 positions."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("long") / "model", build_tokenizer()
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=36_864,
        initializer_range=0.3,  # so that the two contexts differ
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_row(path: Path, prompt_tokens: int) -> Path:
    """A conversation whose prompt has so many tokens, with a remark that only the teacher reads."""
    tokenizer, filler = build_tokenizer(), "x"

    def prompt(length):
        return [{"role": "system", "content": "Answer."}, {"role": "user", "content": filler * length}]

    rendered = tokenizer.apply_chat_template(prompt(0), add_generation_prompt=True, tokenize=False)
    messages = prompt(prompt_tokens - len(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    answer = {"role": "assistant", "content": "2 plus 2 is 4."}
    privileged = [{"role": "assistant", "content": "2 plus 2 is 5."}, {"role": "user", "content": "Not quite."}]
    row = {"messages": [*messages, answer], "privileged_messages": privileged}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def step(place: Path, model: Path, length: int) -> list[str]:
    """The recipe, one step; greedy, so that no completion ends early."""
    rows = write_row(place / f"{length}.jsonl", length - COMPLETION)
    return [
        "step",
        "experiment=opsd_32k",
        "hardware=cpu_tiny",
        f"model.student.path={model}",
        f"data.path={rows}",
        f"run.dir={place / str(length)}",
        f"artifacts.dir={place / 'artifacts'}",
        "data.eval_prompts=0",
        "train.max_steps=1",
        "train.batch_size=1",
        "train.micro_batch_size=1",
        "rollout.temperature=0",
        "run.preflight=off",
    ]


@pytest.mark.slow
def test_what_the_loss_takes_does_not_grow_with_the_tokens():
    ours = {tokens: megabytes("loss", str(tokens)) for tokens in (LENGTH // 4, LENGTH)}
    dense = megabytes("dense_loss", str(LENGTH // 4))
    assert ours[LENGTH] < 1.25 * ours[LENGTH // 4], ours
    assert ours[LENGTH] < dense / 2, (ours, dense)  # of a quarter of the tokens


@pytest.mark.slow
def test_a_step_on_32768_tokens_takes_less_than_one_table_of_logits(model, tmp_path):
    """Growth from 8k to 32k tokens: activations, but no logits: those of one context alone would be 384 MB more."""
    short, long = (megabytes(*step(tmp_path, model, length)) for length in (LENGTH // 4, LENGTH))
    metrics = [json.loads(line) for line in (tmp_path / str(LENGTH) / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in metrics if "train/loss" in line)
    assert trained["train/loss"] > 1e-5  # above the noise of fp32
    assert trained["rollout/length_mean"] == COMPLETION and trained["train/tokens"] == COMPLETION
    dense = megabytes("dense_step", str(model), str(LENGTH))
    print({"8192": short, "32768": long, "dense": dense})
    assert long - short < 300, (short, long)
    assert long < dense / 4, (long, dense)
