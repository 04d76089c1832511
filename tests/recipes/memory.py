"""A process that says how much memory one thing takes: `python memory.py loss|dense_loss|step|dense_step …`, JSON on stdout.

loss TOKENS, dense_loss TOKENS: opsd's loss of that many loss tokens, forward and backward, from hidden states on.
step WORDS…: `python -m opd WORDS`. dense_step FOLDER TOKENS: the same on whole logits of both contexts, without opd.

Megabytes are the peak of the resident set, less what was resident before, by the kernel's own mark, which is reset first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 32, 4096


def resident(name: str) -> float:
    """VmRSS or VmHWM, its peak, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(name)


def growth(action: Any) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def loss_inputs(tokens: int) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    head = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    return hidden, torch.randn(tokens, HIDDEN), head


def fused_loss(tokens: int) -> None:
    from opd.objectives import divergence_loss, sum_over_tokens
    from opd.protocols import Dense, Head

    hidden, teacher, head = loss_inputs(tokens)
    scores = Dense(teacher, Head(head.detach()))
    (sum_over_tokens(Dense(hidden, Head(head)), divergence_loss(scores, beta=0.5)).loss / tokens).backward()


def dense_loss(tokens: int) -> None:
    hidden, teacher, head = loss_inputs(tokens)
    jensen_shannon(hidden @ head.t(), teacher @ head.detach().t()).mean().backward()


def jensen_shannon(student: Any, teacher: Any) -> Any:
    """D_1/2 of two tables of logits, a number a token."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    mixture = (s.exp() + t.exp()).div(2).log()
    return ((s.exp() * (s - mixture)).sum(-1) + (t.exp() * (t - mixture)).sum(-1)) / 2


def dense_step(folder: str, tokens: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(tokens)[None] % 250
    with torch.no_grad():
        teacher = model(ids).logits
    jensen_shannon(model(ids).logits, teacher)[:, -1024:].mean().backward()
    torch.optim.AdamW(model.parameters()).step()


def opd_step(words: list[str]) -> None:
    from opd.__main__ import main

    sys.argv = ["opd", *words]
    main()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    if what in ("loss", "dense_loss"):
        measured = fused_loss if what == "loss" else dense_loss
        measured(64)  # what is allocated once is not the tokens'
        megabytes = growth(lambda: measured(int(rest[0])))
    elif what == "dense_step":
        dense_step(rest[0], 64)
        megabytes = growth(lambda: dense_step(rest[0], int(rest[1])))
    else:
        import opd.pipeline  # noqa: F401  what is imported is not the step's

        megabytes = growth(lambda: opd_step(rest))
    print(json.dumps({"megabytes": megabytes}))
