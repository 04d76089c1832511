"""`python -m opd …` with models of a few thousand parameters: in a process of its own, but without its imports.

The processes are forked off a server that has imported everything and run nothing, so each is a fresh command that can
be killed; importing torch and transformers once for all of them is what makes a matrix of kills affordable.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from contract.tiny import make_model
from contract.variants import Variant

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ,.+-=:"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["opd.pipeline", "contract.command"])


def write_inputs(folder: Path) -> list[str]:
    """A student, a teacher with a padded table and rows with completions; the words that make a run of them."""
    vocabulary = {character: number for number, character in enumerate(["</s>", "?", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    for name, seed, size in (("student", 1, len(vocabulary)), ("teacher", 2, 64)):
        make_model("llama", seed, size).save_pretrained(folder / name)
        wrapped.save_pretrained(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(3, 12) for b in range(95, 100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "data=file",
        f"data.path={folder / 'rows.jsonl'}",
        "data.eval_prompts=4",
        "model/student=path",
        f"model.student.path={folder / 'student'}",
        "model/teacher=path",
        f"model.teacher.path={folder / 'teacher'}",
    ]


SMALL = (
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "train.learning_rate=0.003",
    "rollout.max_completion_tokens=8",
    "rollout.group_size=1",
    "evaluation.divergence=false",
    "evaluation.sampled=false",
    "train.eval_every_steps=0",
    "train.sample_every_steps=0",
)


def words_of(variant: Variant, inputs: list[str], folder: Path, *more: str) -> list[str]:
    """The command line of this variant in this run folder."""
    return [
        f"method={variant.method}",
        "hardware=cpu_tiny",
        *inputs,
        *SMALL,
        *variant.overrides,
        f"run.dir={folder}",
        *more,
    ]


@dataclass
class Command:
    """A command that runs, or ran; `said` is what it wrote."""

    process: multiprocessing.process.BaseProcess
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def finish(self) -> Command:
        """Wait for its good end."""
        self.process.join(timeout=120)
        assert self.process.exitcode == 0, self.said[-3000:]
        return self

    def kill(self) -> None:
        """SIGKILL: nothing can be tidied up."""
        self.process.kill()
        self.process.join()


def start(words: list[str], log: Path) -> Command:
    """Start `python -m opd` with these words."""
    process = FORKS.Process(target=_main, args=(words, str(log)), daemon=True)
    process.start()
    return Command(process, log)


def _main(words: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["opd", *words]
    from opd.__main__ import main

    main()


def logged(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def train_losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in logged(folder) if "train/loss" in line]


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of the final model, and of the adapter where there is one."""
    tensors = {}
    for part in ("final_model", "final_adapter"):
        for path in sorted((folder / part).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                tensors[f"{part}/{name}"] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    assert tensors
    return tensors
