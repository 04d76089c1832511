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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from contract.tiny import STUDENT_VOCAB, TEACHER_VOCAB, make_model
from contract.tokens import STOPS, student_tokenizer, teacher_tokenizer
from contract.variants import KEPT, PLACEHOLDER, Variant
from opd.data.responses import write_response
from opd.protocols import Example

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["opd.pipeline", "contract.command"])


def write_inputs(folder: Path) -> Path:
    """What the placeholders of `variants` stand for: models, one of them with another tokenizer, answers, and rows.

    The rows serve every method: a prompt with a completion, a pair, and what only a teacher may see.
    """
    for name, seed, size, tokenizer in (
        ("student", 1, STUDENT_VOCAB, student_tokenizer()),
        ("teacher", 2, TEACHER_VOCAB, student_tokenizer()),
        ("foreign_teacher", 2, TEACHER_VOCAB, teacher_tokenizer()),
        ("dpo_teacher", 3, TEACHER_VOCAB, student_tokenizer()),
        ("ref_teacher", 4, TEACHER_VOCAB, student_tokenizer()),
    ):
        model = make_model("llama", seed, size)
        model.generation_config.eos_token_id = list(STOPS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    numbers = [(a, b) for a in range(3, 12) for b in range(95, 100)]
    rows = [
        {"prompt": f"{a}+{b}=", "completion": f"{a + b}", "privileged": f"a {a + b}"}
        | {"chosen": f"{a + b}", "rejected": f"{a + b + 1} b"}
        for a, b in numbers
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "responses").mkdir()
    read = student_tokenizer()
    answers = [(read(f"{a}+{b}=")["input_ids"], [*read(f"{a}{b}")["input_ids"], STOPS[1]]) for a, b in numbers]
    lines = [write_response(Example(n, prompt), ids, True, read) for n, (prompt, ids) in enumerate(answers)]
    (folder / "responses" / "responses.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


SMALL = (
    "hardware=cpu_tiny",
    "data=file",
    f"data.path={PLACEHOLDER}rows.jsonl",
    "data.eval_prompts=4",
    "model/student=path",
    f"model.student.path={PLACEHOLDER}student",
    "model/teacher=path",
    f"model.teacher.path={PLACEHOLDER}teacher",
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


def words_of(variant: Variant, inputs: Path, folder: Path, *more: str) -> list[str]:
    """The command line of this variant in this run folder; scores that it reads are kept first."""
    words = list(variant.words)
    if live := [word for word in words if KEPT not in word] if KEPT in " ".join(words) else []:
        kept = inputs / f"scores-{variant.method}"
        if not kept.exists():
            asking = _line(variant.method, live, inputs, kept, "mode=scores")
            start(asking, inputs / f"scores-{variant.method}.log").finish()
        words = [word.replace(KEPT, str(kept)) for word in words]
    return _line(variant.method, words, inputs, folder, *more)


def _line(method: str, words: Sequence[str], inputs: Path, folder: Path, *more: str) -> list[str]:
    named = [word.replace(f"={PLACEHOLDER}", f"={inputs}/") for word in (*SMALL, *words)]
    return [f"method={method}", *named, f"run.dir={folder}", f"artifacts.dir={folder}-artifacts", *more]


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
